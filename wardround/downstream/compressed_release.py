"""The release folder of a compressed backbone: its parent's lineage, and what was done to it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from wardround.backbones import Backbone, save_release
from wardround.backbones.compressed import Shapes
from wardround.config import Protocol
from wardround.errors import CheckpointError
from wardround.registry.release import CONFIG, PROVENANCE, WEIGHTS, file_hashes
from wardround.registry.sbom import SBOM, bill_of_materials
from wardround.registry.versions import software, versions
from wardround.report.card import CARD, card

NEEDED = (
    "backbone",
    "differential_privacy",
    "federation",
    "federation_digest",
    "method",
    "modality",
    "protocol",
    "protocol_digest",
    "round",
    "rounds",
    "sha256",
    "sites",
    "software",
)
PRIVACY = (
    "The weights also depend, without noise, on the {images} images that they were compressed with: nothing is "
    "promised to the people on these."
)
KEPT = (
    " What the original promises the sites' patients holds for whatever is computed from it, so for this too, as long "
    "as none of them is on these images."
)


@dataclass(frozen=True)
class Step:
    """What was done to a backbone."""

    by: str  # prune, low-rank or distil
    settings: Mapping[str, Any]
    images: int  # that it was made with; none is in it


def lineage(folder: Path, source: str) -> dict[str, Any]:
    """Return the provenance of a release. Raises CheckpointError where it does not say what a card asks for."""
    try:
        said: dict[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
    except (OSError, ValueError):
        said = {}
    if lacking := [name for name in NEEDED if name not in said]:
        raise CheckpointError(
            f"backbone '{source}': '{PROVENANCE}' does not say its {lacking[0]}; without lineage nothing is made of "
            "it. Take a run folder or a pulled release."
        )
    return said


def changed_shapes(original: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of tensors that a network does not have, or has in another shape."""
    known = {name: tensor.shape for name, tensor in original.state_dict().items()}
    return {name: list(tensor.shape) for name, tensor in tensors.items() if known.get(name) != tensor.shape}


def write_reshaped(
    aside: Path, folder: Path, said: Mapping[str, Any], step: Step, net: nn.Module, shapes: Shapes
) -> None:
    """Write a release of which some tensors have other shapes than those of its architecture.

    `config.json` lists them under `compressed` and names an architecture that timm does not know: timm raises.
    """
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    known = json.loads((folder / CONFIG).read_bytes())["pretrained_cfg"]
    name = f"{said['backbone']} of Wardround, compressed, to be loaded by wardround.load_backbone"
    config = {"architecture": name, "pretrained_cfg": known, "compressed": {"by": step.by, "shapes": shapes}}
    save_file(tensors, aside / WEIGHTS)
    (aside / WEIGHTS).chmod(0o644)  # as every release's
    (aside / CONFIG).write_text(json.dumps(config, indent=2))
    hashes = {tensor: hashlib.sha256((aside / tensor).read_bytes()).hexdigest() for tensor in (WEIGHTS, CONFIG)}
    _describe(aside, {**_after(folder, said, step), "stock_timm": False, "sha256": hashes})


def write_student(
    aside: Path, folder: Path, said: Mapping[str, Any], step: Step, recipe: Protocol, backbone: Backbone
) -> None:
    """Write a release of another architecture: `protocol` is then the parent's but for its backbone, and no site's."""
    state = {f"backbone.{name}": tensor.detach().cpu().numpy() for name, tensor in backbone.state_dict().items()}
    made = _after(folder, said, step)
    made.pop("batch_norm", None)
    made |= {"backbone": recipe.backbone.name, "protocol": recipe.model_dump(mode="json")}
    save_release(recipe, state, aside, made)
    _describe(aside, json.loads((aside / PROVENANCE).read_bytes()))


def _after(folder: Path, said: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """Return a lineage with one step more; what was measured of the parent does not hold for its child."""
    weights = file_hashes(folder)[WEIGHTS]
    promised = said["differential_privacy"] != "none"
    done = {
        **asdict(step),
        "parent": {"weights": weights, "backbone": said["backbone"], "parent": said.get("parent")},
        "privacy": PRIVACY.format(images=f"{step.images:,}") + (KEPT if promised else ""),
        "software": software(),
        "versions": versions(),
    }
    return {
        **said,
        "parent": {"version": f"{said['federation']}, round {said['round']}", "weights": weights, "by": step.by},
        "evaluation": {"missing": "compressed.json has what it lost; 'wardround evaluate' measures it"},
        "features": {"missing": "those of the parent do not hold for it"},
        "compressed": [*said.get("compressed", []), done],
    }


def _describe(aside: Path, said: Mapping[str, Any]) -> None:
    """Write provenance, card and bill of materials."""
    (aside / PROVENANCE).write_text(json.dumps(said, indent=2, sort_keys=True))
    (aside / CARD).write_text(card(said))
    (aside / SBOM).write_text(bill_of_materials(said["federation"], said["round"], said["sha256"][WEIGHTS]))
