"""From a committed round to a release: weights, lineage, what the coordinator measured, card, bill, signature.

RUN/release/           the newest round that was released      RUN/release.key   signs what one process trained
RUN/releases/00002/    an earlier one
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from wardround.config import FederationConfig, digest
from wardround.config.privacy import NoPrivacyConfig, SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import CheckpointError, ConfigError, DataError
from wardround.privacy import site_level
from wardround.privacy.statement import statement
from wardround.probe.doubts import FORCED, NO_PATIENT
from wardround.registry import release, signing
from wardround.registry.durable import new_folder
from wardround.registry.mlflow_store import ModelRow
from wardround.registry.sbom import SBOM, bill_of_materials
from wardround.registry.versions import software, versions
from wardround.report.card import CARD, card
from wardround.server.run_folder import RunFolder
from wardround.signatures import fingerprint

if TYPE_CHECKING:
    from wardround.data import LabelledImages  # loads torch, as much here does where it is called

FEWEST = 8  # images to judge a collapse by: so few may well be alike
# What of [membership] shapes the result; addresses and hours do not.
_SHAPES = {"sites", "units", "min_sites", "sites_per_round", "buffer", "staleness", "max_staleness"}


def export(
    run: RunFolder,
    number: int | None = None,
    rows: Sequence[ModelRow] = (),
    scores: Path | None = None,
    key: Ed25519PrivateKey | None = None,
) -> Path:
    """Write a committed round, by default the newest, as a release folder below the run folder, and return it.

    `rows` are the registered versions, among which its parent is; `scores` what `wardround evaluate --out` wrote of
    it, in place of probes on the evaluation set. Unless a key is given, the run folder's own signs. A release that is
    there, and is of the same config and signer, is left as it is; any other, until the new one is whole.
    Raises ConfigError for a round that is not committed, scores that are none of this backbone, and for batch
    normalisation without an evaluation set, whose images give its statistics.
    """
    number = _committed(run, number)
    key = key or signing.release_key(run.path / signing.KEY)
    newest = number == run.committed()[-1]
    folder = run.path / "release" if newest else run.path / "releases" / f"{number:05d}"
    lineage = lineage_of(run, number)
    if scores is None and _is_there(folder, lineage, fingerprint(key.public_key())):
        return folder
    from wardround.backbones import save_release

    of, evaluation = read_scores(scores) if scores else (None, None)  # first: the rest takes minutes
    images = evaluation_images(run.config)
    with new_folder(folder, replace=True) as aside:
        norm = images if run.config.backbone.norm == "batch" else None
        save_release(run.protocol, dict(run.checkpoint(number).state), aside, lineage, norm)
        said = json.loads((aside / release.PROVENANCE).read_bytes())
        weights = said["sha256"][release.WEIGHTS]
        if of is not None and of != weights:
            raise ConfigError(
                f"{scores}: is of other weights ({of[:12]}, expected {weights[:12]}); evaluate this round."
            )
        said["parent"] = parent(run, rows, weights)
        said["evaluation"] = evaluation or measure(run.config, aside)
        said["features"] = spread(run, number, aside, images)
        (aside / release.PROVENANCE).write_text(json.dumps(said, indent=2, sort_keys=True))
        (aside / CARD).write_text(card(said))
        (aside / SBOM).write_text(bill_of_materials(run.config.name, number, weights))
        signing.write_manifest(aside, run.config.name, release.file_hashes(aside), key)
    return folder


def lineage_of(run: RunFolder, number: int) -> dict[str, Any]:
    """Return where a round's backbone comes from, as far as the run folder tells: counts and hashes, no identifiers."""
    config, privacy = run.config, run.config.privacy
    ceiling = config.release.epsilon
    if ceiling is None and not isinstance(privacy, NoPrivacyConfig):
        ceiling = privacy.epsilon
    return {
        "federation": config.name,
        "federation_digest": digest(config),
        "protocol": run.protocol.model_dump(mode="json"),
        "protocol_digest": run.digest,
        "membership": config.membership.model_dump(mode="json", include=_SHAPES),
        "gate": {"tolerance": config.release.tolerance, "epsilon": ceiling},
        "method": config.method.name,
        "backbone": config.backbone.name,
        "modality": config.views.modality,
        "round": number,
        "rounds": config.training.rounds,
        "sites": sites_of(run, number),
        "differential_privacy": guarantee(run),
        "software": software(),
        "versions": versions(),
    }


def sites_of(run: RunFolder, number: int) -> dict[str, dict[str, Any]]:
    """Return for each site that a round's state was made with: its last weight, its rounds, and its declared counts.

    Where a patient or an image is the privacy unit, the count is their declared number; where a site is, there is none.
    """
    privacy = run.config.privacy
    counts = ["units"] if isinstance(privacy, UnitPrivacyConfig) else ["images", "patients"]
    if isinstance(privacy, SitePrivacyConfig):
        counts = []
    found: dict[str, dict[str, Any]] = {}
    for earlier in range(1, number + 1):
        for site, figures in run.record(earlier)["sites"].items():
            rounds = found.get(site, {}).get("rounds", 0) + 1
            found[site] = {"weight": figures["weight"], "rounds": rounds, **{name: figures[name] for name in counts}}
    return found


def guarantee(run: RunFolder) -> str | dict[str, Any]:
    """Return what a release promises: "none", or unit, adjacency, delta, epsilon and the sentence that says it.

    Of all rounds that are committed, whichever is released: that one was chosen in sight of the others. Inside
    a site, epsilon is each site's own, as it declared it with its last folded update.
    """
    privacy, rounds = run.config.privacy, run.committed()[1:]
    if isinstance(privacy, NoPrivacyConfig):
        return "none"
    words = {"unit": privacy.unit, "adjacency": f"add or remove one {privacy.unit}", "delta": privacy.delta}
    if isinstance(privacy, SitePrivacyConfig):
        epsilon = site_level.spent(privacy, run.config.training.rounds, len(rounds))
        return {**words, "epsilon": epsilon, "statement": statement(privacy, len(rounds), epsilon=epsilon)}
    last: dict[str, tuple[int, float]] = {}
    for number in rounds:
        for site, figures in run.record(number)["sites"].items():
            last[site] = (number, figures["epsilon"])
    sentences = {site: statement(privacy, number, site, epsilon) for site, (number, epsilon) in sorted(last.items())}
    return {**words, "epsilon": {site: epsilon for site, (_, epsilon) in last.items()}, "statement": sentences}


def parent(run: RunFolder, rows: Sequence[ModelRow], weights: str) -> dict[str, str] | None:
    """Return the version that a run started from; else the newest of its name with other weights; else None."""

    def holds(row: ModelRow) -> str:
        return str(json.loads(row.tags["files"]).get(release.WEIGHTS))

    if run.start is not None:
        version = next((f"{row.name}/{row.version}" for row in rows if holds(row) == run.start), "not registered here")
        return {"version": version, "weights": run.start, "by": "initial_weights"}
    for row in rows:
        if row.name == run.config.name and holds(row) != weights:
            return {"version": f"{row.name}/{row.version}", "weights": holds(row), "by": "name"}
    return None


def measure(config: FederationConfig, folder: Path) -> dict[str, Any]:
    """Return the probes of a release on the coordinator's evaluation set, or why there are none."""
    if config.evaluation_set is None:
        return {"missing": "the federation's file names no [evaluation_set]"}
    if config.data.dimensions == 3:
        return {"missing": "probes are of flat images"}
    from wardround.downstream.evaluate import compare

    try:
        found = compare(folder, evaluation_set(config), fractions=(1.0,), draws=1)
    except DataError as error:
        return {"missing": str(error)}
    return summary(json.loads(found.to_json()), "the coordinator's evaluation_set")


def read_scores(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the hash of the weights that `wardround evaluate --out` wrote of, where it says one, and the probes.

    Raises ConfigError for a file that cannot be read, or is none of these.
    """
    try:
        found = json.loads(path.read_bytes())
        said = found.get("weights")
        return None if said is None else str(said), summary(found, "wardround evaluate, as whoever registered it said")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is not what 'wardround evaluate --out' writes; evaluate the backbone anew."
        ) from error


def summary(found: dict[str, Any], by: str) -> dict[str, Any]:
    """Return of an evaluation what a release says: one score by probe and arm, at the most labels that were used.

    Results of one `set` may be compared: its images, where they were hashed, its splits and its classes.
    """
    most = max(row["fraction"] for row in found["rows"])
    several = found["rows"][0]["mean"]["balanced_accuracy"] is None  # labels an image
    metric = "auc" if several else "balanced_accuracy"
    probes: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        if row["fraction"] == most:
            probes.setdefault(row["probe"], {})[row["arm"]] = float(row["mean"][metric])
    probes["linear"]["backbone"]  # what the gate asks for
    known = {name: found.get(name) for name in ("data", "classes", "images", "patients", "seed")}
    same = hashlib.sha256(
        json.dumps({**known, "fraction": most, "metric": metric}, sort_keys=True).encode()
    ).hexdigest()
    name = metric.replace("_", " ").replace("auc", "AUC")
    # Of the notes those alone that must go with the scores: they count, and name nobody, as a group's name might.
    doubts = [note for note in found.get("notes", ()) if note.startswith((FORCED, NO_PATIENT))]
    said = {"by": by, "metric": name, "set": same, "images": found["images"], "fraction": most, "probes": probes}
    return {**said, "doubts": doubts} if doubts else said


def spread(run: RunFolder, number: int, folder: Path, images: NDArray[np.uint8] | None) -> dict[str, Any]:
    """Return effective rank and spread of the features, by which a collapse shows; or why they are not known.

    Of the evaluation set's images; else the lowest that sites declared, where nothing has to be withheld.
    """
    if images is not None and run.config.data.dimensions == 2:
        import torch

        from wardround.downstream.load import load_backbone
        from wardround.probe.features import features
        from wardround.probe.monitor import IMAGES, figures

        data = run.config.data
        found = torch.from_numpy(features(load_backbone(folder), images[:IMAGES], data.mean, data.std))
        monitor = figures(found, found)
        of = f"{len(found)} images of the coordinator's evaluation_set"
        return {"effective_rank": monitor.effective_rank, "feature_spread": monitor.feature_spread, "of": of}
    if not isinstance(run.config.privacy, NoPrivacyConfig):
        return {"missing": "sites withhold it, and there is no [evaluation_set] of flat images"}
    sites = [one for one in run.record(number)["sites"].values() if one["images"] >= FEWEST]
    if not sites:
        return {"missing": f"no site has {FEWEST} images, and there is no [evaluation_set] of flat images"}
    lowest = {name: min(one[name] for one in sites) for name in ("effective_rank", "feature_spread")}
    return {**lowest, "of": "each site's own images, the lowest of all sites"}


def evaluation_images(config: FederationConfig) -> NDArray[np.uint8] | None:
    """Return the images that the coordinator draws, [N, C, S, S], or None where it has none."""
    return None if config.evaluation_set is None else evaluation_set(config).images


def evaluation_set(config: FederationConfig) -> "LabelledImages":
    """Return the coordinator's own labelled images, which the config names."""
    from wardround.data import procedural_set, read_labelled

    chosen = config.evaluation_set
    assert chosen is not None, "the caller has looked"
    if chosen.folder is not None and chosen.kind == "labelled":  # the config sees to it that the folder is named
        return read_labelled(chosen.folder, config.data)
    return procedural_set(chosen.count, config.seed, config.data)


def _committed(run: RunFolder, number: int | None) -> int:
    """Return a round that is committed, and trained. Raises ConfigError."""
    known = run.committed()[1:]
    if not known:
        raise ConfigError(f"{run.path}: has committed no round yet; there is nothing to release.")
    if number is not None and number not in known:
        listed = f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
        raise ConfigError(f"{run.path}: has no committed round {number}; it has {listed}.")
    return known[-1] if number is None else number


def _is_there(folder: Path, lineage: dict[str, Any], signer: str) -> bool:
    """Return whether a whole release of this round, config and signer lies in a folder."""
    try:
        release.check(folder)
        said = json.loads((folder / release.PROVENANCE).read_bytes())
        same = all(said[name] == lineage[name] for name in ("round", "federation_digest", "differential_privacy"))
        return same and release.signer(folder) == signer
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return False
