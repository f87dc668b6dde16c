"""The model card of a release, from its lineage alone: Mitchell et al. 2019 (arXiv:1810.03993), Hugging Face layout."""

import json
from collections.abc import Mapping
from typing import Any

CARD = "README.md"


def card(said: Mapping[str, Any]) -> str:
    """Return the card of a release whose provenance is `said`: YAML front matter, then Markdown."""
    parts = {
        "Model details": _details(said),
        "Intended use": [
            "To start from: features of medical images for retrieval, probes, fine-tuning and segmentation by people "
            "who measure the result on their own patients. It was trained without labels and tells no diagnosis.",
            "",
            "Out of scope: decisions on a patient without a study of the whole system; other modalities than it was "
            "trained on.",
        ],
        "Training data": _data(said),
        "Privacy": _privacy(said),
        "Evaluation": _evaluation(said),
        "Ethical considerations and caveats": [
            "The images are those of the sites above, with whatever groups of patients and machines they have; what a "
            "group's share was is not known here. Measure by site and by group before use.",
            "",
            *(
                []
                if _private(said)
                else ["Without differential privacy, nothing bounds what the weights tell of one patient."]
            ),
        ],
        "Provenance": _provenance(said),
    }
    title = f"# {said['federation']}, round {said['round']}"
    sections = [line for name, lines in parts.items() for line in ("", f"## {name}", "", *lines)]
    return "\n".join([*_front(said), "", title, *sections]).rstrip() + "\n"


def _front(said: Mapping[str, Any]) -> list[str]:
    """Return the YAML; a JSON string is a YAML string."""
    tags = ["medical-imaging", "self-supervised", "federated", said["method"], said["modality"]]
    values = {
        "library_name": "timm" if said["stock_timm"] else "wardround",
        "pipeline_tag": "image-feature-extraction",
        "license": "other",
        "license_name": "as the federation's sites agreed",
        "tags": [*tags, *(["differential-privacy"] if _private(said) else [])],
    }
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---"]


def _details(said: Mapping[str, Any]) -> list[str]:
    data = said["protocol"]["data"]
    size = " x ".join(str(data["image_size"]) for _ in range(data["dimensions"]))
    loads = (
        "`timm.create_model`"
        if said["stock_timm"]
        else "`wardround.load_backbone` (stock timm would build another function)"
    )
    line = (
        f"`{said['backbone']}`, trained by `{said['method']}` on images of {size} with {data['channels']} channel(s)."
    )
    done = [
        f"Compressed by `{step['by']}` from the `{step['parent']['backbone']}` whose weights are "
        f"`{step['parent']['weights'][:12]}`, with {step['images']:,} other images; `compressed.json` says the cost."
        for step in said.get("compressed", [])
    ]
    line = " ".join([line, *done])
    square = " The whole image is squeezed into the square, bilinear, antialiased." if data["dimensions"] == 2 else ""
    return [line, "", f"Loaded by {loads}. Normalisation: mean {data['mean']}, std {data['std']} on [0, 1].{square}"]


def _data(said: Mapping[str, Any]) -> list[str]:
    """Return the sites with what they declared."""
    counts = sorted({name for site in said["sites"].values() for name in site} - {"weight", "rounds"})
    names = ["site", "weight", "rounds", *(f"declared {name}" if name == "units" else name for name in counts)]
    rows = [
        [site, f"{one['weight']:.3f}", str(one["rounds"]), *(f"{one[name]:,}" for name in counts)]
        for site, one in sorted(said["sites"].items())
    ]
    modalities = ", ".join(said["protocol"]["data"]["criteria"]["modality"]) or "any"
    words = f"Views of kind '{said['modality']}'; DICOM modalities: {modalities}. No image left its site."
    return [words, "", *_table(names, rows), "", "Weights are those of each site's last round."]


def _privacy(said: Mapping[str, Any]) -> list[str]:
    promised = said["differential_privacy"]
    since = [line for step in said.get("compressed", []) for line in ("", step["privacy"])]
    if not _private(said):
        return ["None: the coordinator may have been able to reconstruct images.", *since]
    sentences = promised["statement"]
    return [*([sentences] if isinstance(sentences, str) else [f"- {line}" for line in sentences.values()]), *since]


def _evaluation(said: Mapping[str, Any]) -> list[str]:
    found, features = said["evaluation"], said["features"]
    if "missing" in found:
        lines = [f"Not measured: {found['missing']}."]
    else:
        arms = list(dict.fromkeys(arm for scores in found["probes"].values() for arm in scores))
        rows = [
            [probe, *(f"{scores[arm]:.3f}" if arm in scores else "" for arm in arms)]  # not every arm is trained on
            for probe, scores in found["probes"].items()
        ]
        images = ", ".join(f"{count} {split}" for split, count in found["images"].items())
        fraction = found.get("fraction", 1.0)  # earlier releases did not say it
        share = f"; {fraction:.2g} of the training labels" if fraction < 1.0 else ""
        lines = [
            f"{found['metric'][:1].upper()}{found['metric'][1:]} by {found['by']}; images: {images}{share}.",
            "",
            *_table(["probe", *arms], rows),
        ]
        lines += ["", "`random` is its own random initialisation, `raw pixels` the images themselves: the floors."]
        lines += [line for doubt in found.get("doubts", ()) for line in ("", f"**{doubt}**")]
        linear = found["probes"]["linear"]
        if linear["backbone"] <= max(linear.get(floor, 0.0) for floor in ("random", "raw pixels")):
            lines += ["", "**On these images it does not beat both floors under the linear probe.**"]
    if "missing" in features:
        return [*lines, "", f"Spread of the features: not measured: {features['missing']}."]
    rank, width = features["effective_rank"], features["feature_spread"]
    return [*lines, "", f"Effective rank {rank:.1f}, spread {width:.3f}, of {features['of']}."]


def _provenance(said: Mapping[str, Any]) -> list[str]:
    """Return the digests, for whoever compares them."""
    values = {
        "protocol": said["protocol_digest"],
        "federation's file": said["federation_digest"],
        "rounds": f"{said['round']} of {said['rounds']}",
        "parent": f"{said['parent']['version']}, by {said['parent']['by']}" if said["parent"] else "none",
        "Wardround": f"{said['software']['wardround']}, sources {said['software']['sources']}",
        said["software"]["lock_of"]: said["software"]["lock"],
        **dict(sorted(said["sha256"].items())),
    }
    rows = [[name, value] for name, value in values.items()]
    return [
        *_table(["what", "value"], rows),
        "",
        "All of it is in `provenance.json`; `sbom.cdx.json` lists the packages.",
    ]


def _private(said: Mapping[str, Any]) -> bool:
    return isinstance(said["differential_privacy"], Mapping)


def _table(names: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]
