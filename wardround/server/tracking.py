"""What happens after a commit: the picture, the MLflow run, and at the end the release.

MLflow is a record, never the truth. While it cannot be reached, training goes on; every committed
round that is not yet logged is logged at the next commit, or by the next start of the same command; in another
MLflow than before, all of them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from tqdm import tqdm

from wardround.config.privacy import SitePrivacyConfig
from wardround.errors import ConfigError, TrackingError
from wardround.privacy.accounting import upward
from wardround.registry.durable import write_file
from wardround.registry.mlflow_store import Store
from wardround.registry.release import PROVENANCE
from wardround.registry.signing import kit_key
from wardround.report.curves import draw_losses
from wardround.server.release import FEWEST, evaluation_images, export
from wardround.server.run_folder import RunFolder, open_run
from wardround.update import DRIFT, MEASURED, WITHHELD, collapsed

# What loads torch, half a gigabyte, is imported where images are drawn or a release is written: rounds need it not.

Sites = Mapping[str, Mapping[str, Any]]  # what each site declared in a round
CURVES_EVERY = 10.0  # seconds: the curves take a third of one, and rounds of small networks not much more
ALIAS = "candidate"  # what a round is released as
_LOW_FOR, _RISEN = 2, 1.2  # rounds; times: less is no rise


class Tracking:
    """Records a run's committed rounds in MLflow, at least once each and in order."""

    def __init__(self, run: RunFolder, key: Ed25519PrivateKey | None = None, *, elsewhere: bool = False) -> None:
        """Take a run, and what signs its releases: unset, the run folder's own key.

        `elsewhere`: its MLflow is another than the run's, and gets a release, but no round that the run's has.
        """
        self.run, self.key, self.elsewhere = run, key, elsewhere
        self.warned = False
        self.drawn = -CURVES_EVERY  # of time.monotonic, which begins at 0

    def committed(self, number: int) -> None:
        """Say, draw and log what a commit brought."""
        tqdm.write(round_line(self.run, number))
        sites = self.run.record(number)["sites"]
        before = [self.run.record(earlier)["sites"] for earlier in range(1, number)]
        collapse = collapse_lines(sites, before, may_rise=may_rise(self.run, number))
        for warning in (*collapse, *drift_lines(sites, before), *audit_lines(sites, before)):
            tqdm.write(warning)
        self.draw(number)
        self._try(self.log)

    def open(self) -> None:
        """Open the run in MLflow while sites connect: a new database takes seconds, which no round need wait for."""
        self._try(lambda: self.mlflow_run)

    def _try(self, call: Callable[[], object]) -> None:
        """Call what needs MLflow; warn once where it is not there."""
        try:
            call()
        except TrackingError as error:
            if not self.warned:
                tqdm.write(f"warning: {error} Training goes on; the rounds are logged later.")
            self.warned = True

    def draw(self, number: int) -> None:
        """Write the round's pictures, of the coordinator's own images only."""
        if number == self.run.config.training.rounds or time.monotonic() > self.drawn + CURVES_EVERY:
            self._draw_losses(number)
            self.drawn = time.monotonic()
        if self.images is not None:
            from wardround.report.neighbours import draw_neighbours
            from wardround.report.reconstruction import draw_reconstructions

            state = dict(self.run.checkpoint(number).state)
            title = f"{self.run.config.name}, round {number}"
            drawn = (self.run.config, state, self.images, self._picture(number), title)
            if not draw_reconstructions(*drawn):
                draw_neighbours(*drawn)

    def _draw_losses(self, number: int) -> None:
        losses: dict[str, list[tuple[int, float]]] = {}
        for earlier in range(1, number + 1):
            for site, figures in self.run.record(earlier)["sites"].items():
                points = losses.setdefault(site, [])
                points += [(earlier, figures["loss"])] if figures["loss"] is not None else []
        draw_losses(losses, self.run.path / "losses.png", self.run.config.name)

    def log(self) -> None:
        """Log every committed round that this MLflow does not have yet. Raises TrackingError where it is not there."""
        for number in filter(self._lacks, self.run.committed()[1:]):
            pictures = {"images": self._picture(number), "losses": self.run.path / "losses.png"}
            if isinstance(self.run.config.privacy, SitePrivacyConfig):
                del pictures["losses"]
            found = {name: path for name, path in pictures.items() if path.exists()}
            self.store.log_round(self.mlflow_run, number, shown(self.run, number), found)
            write_file(self.run.mark(number), json.dumps({"run": self.mlflow_run}).encode())

    def _lacks(self, number: int) -> bool:
        known = self.run.logged(number)
        return known is None or (known != self.mlflow_run and not self.elsewhere)

    def register(self) -> str:
        """Log what is left, register the last committed round as the candidate, close the run; return NAME/version.

        Raises TrackingError where MLflow is not there; nothing is lost, the same command tries again.
        """
        reference = self.release()
        self.store.close_run(self.mlflow_run, "FINISHED")
        return reference

    def release(self, number: int | None = None, scores: Path | None = None) -> str:
        """Register a committed round, by default the newest, as the candidate; return NAME/version. See `export`."""
        self.log()
        name, run = self.run.config.name, self.mlflow_run
        folder = export(self.run, number, self.store.models(), scores, self.key)
        said = json.loads((folder / PROVENANCE).read_bytes())
        # Of the federation only: who may read a release need not see each hospital's figures.
        public = {name: value for name, value in shown(self.run, said["round"]).items() if "/" not in name}
        version = self.store.register(folder, name, ALIAS, run, tags_of(said), public)
        return f"{name}/{version}"

    @cached_property
    def store(self) -> Store:
        """The MLflow store, reached when it is first needed."""
        return Store(self.run.tracking)

    @cached_property
    def mlflow_run(self) -> str:
        """The id of this federation's run in MLflow."""
        config = self.run.config.model_dump(mode="json", exclude={"membership", "evaluation_set", "release"})
        files = {"federation.json": (self.run.path / "federation.json").read_text()}
        return self.store.open_run(self.run.config.name, self.run.digest, _flat(config), files, self.run.id)

    @cached_property
    def images(self) -> NDArray[np.uint8] | None:
        """The first images of the coordinator's evaluation set, or None where the config names none."""
        return evaluation_images(self.run.config)

    def _picture(self, number: int) -> Path:
        return self.run.path / "pictures" / f"round-{number:05d}.png"


def register(
    path: Path, number: int | None = None, scores: Path | None = None, kit: Path | None = None, uri: str | None = None
) -> str:
    """Register a committed round of a run folder as the candidate, signed with a kit's key; return NAME/version.

    Only what one process trained may do without a kit: the run folder's own key signs it. `uri` is another MLflow
    than the run's. Raises ConfigError for a round or a kit that is not there.
    """
    run = open_run(path)
    if kit is None and any(member.startswith("-----BEGIN") for member in run.members.values()):
        raise ConfigError(
            f"{path}: was trained over a network, and its coordinator signs what it releases; name the folder that "
            "'wardround provision' wrote by --kit."
        )
    key, elsewhere = None if kit is None else kit_key(kit), uri not in (None, run.tracking)
    tracking = Tracking(replace(run, tracking=uri or run.tracking), key, elsewhere=elsewhere)
    reference = tracking.release(number, scores)
    if run.committed()[-1] == run.config.training.rounds:
        tracking.store.close_run(tracking.mlflow_run, "FINISHED")
    return reference


def tags_of(said: Mapping[str, Any]) -> dict[str, str]:
    """Return what of a release's lineage is found without downloading it."""
    promised, probes = said["differential_privacy"], said["evaluation"].get("probes", {})
    privacy = "none"
    if isinstance(promised, Mapping):
        spent = promised["epsilon"]
        most = max(spent.values(), default=0.0) if isinstance(spent, Mapping) else spent
        privacy = f"epsilon {upward(most)}, {promised['adjacency']}, delta {promised['delta']:g}"
    return {
        **{name: str(said[name]) for name in ("round", "method", "backbone", "federation_digest")},
        "protocol": said["protocol_digest"],
        "privacy": privacy,
        "probe": json.dumps(probes.get("linear", {})),
        "parent": said["parent"]["version"] if said["parent"] else "",
        "stock_timm": str(said["stock_timm"]).lower(),
    }


def shown(run: RunFolder, number: int) -> dict[str, float]:
    """Return a round's numbers for MLflow, where users look backbones up.

    Where a site is the privacy unit, what was measured stays in the run folder: it has no noise.
    """
    record = run.record(number)
    if not isinstance(run.config.privacy, SitePrivacyConfig):
        return metrics(record)
    hidden = dict.fromkeys(MEASURED)
    return metrics({**record, "sites": {site: {**figures, **hidden} for site, figures in record["sites"].items()}})


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a round's numbers by name: the federation's, then each site's as `SITE/figure`.

    What the sites withhold is absent.
    """
    sites: Mapping[str, Mapping[str, Any]] = record["sites"]
    told = all(figures["loss"] is not None for figures in sites.values())
    numbers = {
        **({"loss": sum(figures["weight"] * figures["loss"] for figures in sites.values())} if told else {}),
        "sites": float(len(sites)),
        **{name: float(record[name]) for name in ("bytes_sent", "bytes_received", "seconds")},
    }
    for site, figures in sites.items():
        numbers |= {f"{site}/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}
    return numbers


def round_line(run: RunFolder, number: int) -> str:
    """Return one line on a committed round."""
    record = run.record(number)
    numbers = metrics(record)
    refused = "".join(f"; without '{site}': {reason}" for site, reason in record["refused"].items())
    loss = f"{numbers['loss']:.4f}" if "loss" in numbers else WITHHELD
    return (
        f"round {number} of {run.config.training.rounds}: loss {loss}, "
        f"{int(numbers['sites'])} sites, {numbers['seconds']:.1f} s{refused}"
    )


def may_rise(run: RunFolder, number: int) -> bool:
    """Return whether features that are all alike in a round may still come apart by themselves.

    Those of a network that reconstructs pixels do, after a hundred steps or so (benchmarks/LOG.md): unlike the
    losses that compare features, its loss is not lowest where they are alike. After the last round it is too late.
    """
    return run.config.method.name == "mae" and number < run.config.training.rounds


def collapse_lines(sites: Sites, before: Sequence[Sites] = (), *, may_rise: bool = False) -> list[str]:
    """Return a warning for each site to whose backbone all images have come to look alike, as far as sites tell.

    Where the spread `may_rise`, only of one that has been as low for two rounds before.
    """
    lines = []
    for site, declared in sites.items():
        rank, spread = declared["effective_rank"], declared["feature_spread"]
        if rank is None or spread is None or declared["images"] < FEWEST:
            continue
        spreads = [one[site]["feature_spread"] for one in before if site in one]
        earlier = [known for known in spreads if known is not None][-_LOW_FOR:]
        waits = may_rise and (len(earlier) < _LOW_FOR or spread > _RISEN * min(earlier))
        if collapsed(rank, spread) and not waits:
            lines.append(
                f"warning: site '{site}': features collapse (effective rank {rank:.1f}, spread "
                f"{spread:.3f}): all images look alike to the backbone. Lower [training] learning_rate, "
                "or take norm = 'batch' or a method with negatives (docs/methods.md)."
            )
    return lines


def drift_lines(sites: Sites, before: Sequence[Sites]) -> list[str]:
    """Return a line for each site whose new images have come to be further from its first ones than a round before."""
    last = {site: declared.get("drift") for earlier in before for site, declared in earlier.items()}
    return [
        f"warning: site '{site}': its new images drift from those that it began with: {declared['drift']}. The site's "
        "own log says by what; ask there whether a scanner or an export has changed."
        for site, declared in sites.items()
        if declared.get("drift") in DRIFT[1:] and declared["drift"] != last.get(site)
    ]


def audit_lines(sites: Sites, before: Sequence[Sites]) -> list[str]:
    """Return a line for each site whose audit log is not longer than one that it had before: it was cut or restored.

    An update leaves with at least one row more than the one before, that of its own task.
    """
    heads = [{site: declared.get("audit") or "0:" for site, declared in earlier.items()} for earlier in before]
    lines = []
    for site, declared in sites.items():
        seen = max((int(one[site].partition(":")[0]) for one in heads if site in one), default=0)
        if declared.get("audit") and (length := int(declared["audit"].partition(":")[0])) <= seen:
            lines.append(
                f"warning: site '{site}': its audit log has {length} rows, and had {seen} before: it was cut, or put "
                "back from a copy. Ask the site."
            )
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested mapping as `section.key` -> text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
