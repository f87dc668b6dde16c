"""What happens after a commit: the picture, the MLflow run, and at the end the release.

MLflow is a record, never the truth. While it cannot be reached, training goes on; every committed
round that is not yet logged is logged at the next commit, or by the next start of the same command.
"""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from wardround.config import FederationConfig
from wardround.config.privacy import NoPrivacyConfig, SitePrivacyConfig
from wardround.errors import TrackingError
from wardround.privacy import site_level
from wardround.privacy.statement import statement
from wardround.registry.durable import write_file
from wardround.registry.mlflow_store import Store
from wardround.registry.versions import versions
from wardround.report.curves import draw_losses
from wardround.server.run_folder import RunFolder
from wardround.update import DRIFT, MEASURED, WITHHELD, collapsed

# What loads torch, half a gigabyte, is imported where images are drawn or a release is written: rounds need it not.

Sites = Mapping[str, Mapping[str, Any]]  # what each site declared in a round
CURVES_EVERY = 10.0  # seconds: the curves take a third of one, and rounds of small networks not much more
ALIAS = "candidate"  # what the last committed round is released as
FEWEST = 8  # images to judge a collapse by: so few may well be alike


class Tracking:
    """Records a run's committed rounds in MLflow, at least once each and in order."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.warned = False
        self.drawn = -CURVES_EVERY  # of time.monotonic, which begins at 0

    def committed(self, number: int) -> None:
        """Say, draw and log what a commit brought."""
        tqdm.write(round_line(self.run, number))
        sites = self.run.record(number)["sites"]
        before = [self.run.record(earlier)["sites"] for earlier in range(1, number)]
        for warning in (*collapse_lines(sites), *drift_lines(sites, before), *audit_lines(sites, before)):
            tqdm.write(warning)
        self.draw(number)
        try:
            self.log()
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

            state = self.run.checkpoint(number).state
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
        """Log every committed round that has no mark yet. Raises TrackingError where MLflow is not there."""
        waiting = [n for n in self.run.committed() if n > 0 and not self._mark(n).exists()]
        for number in waiting:
            pictures = {"images": self._picture(number), "losses": self.run.path / "losses.png"}
            if isinstance(self.run.config.privacy, SitePrivacyConfig):
                del pictures["losses"]
            found = {name: path for name, path in pictures.items() if path.exists()}
            self.store.log_round(self.mlflow_run, number, shown(self.run, number), found)
            write_file(self._mark(number), json.dumps({"run": self.mlflow_run}).encode())

    def register(self) -> str:
        """Log what is left, register the last committed backbone, close the run; return NAME@alias.

        Raises TrackingError where MLflow is not there; nothing is lost, the same command tries again.
        """
        self.log()
        folder = export(self.run)
        name = self.run.config.name
        number = self.run.committed()[-1]
        tags = {"protocol": self.run.digest, "round": str(number), "method": self.run.config.method.name}
        # Of the federation only: who may read a release need not see each hospital's figures.
        public = {name: value for name, value in shown(self.run, number).items() if "/" not in name}
        self.store.register(folder, name, ALIAS, self.mlflow_run, tags, public)
        self.store.close_run(self.mlflow_run, "FINISHED")
        return f"{name}@{ALIAS}"

    @cached_property
    def store(self) -> Store:
        """The MLflow store, reached when it is first needed."""
        return Store(self.run.tracking)

    @cached_property
    def mlflow_run(self) -> str:
        """The id of this federation's run in MLflow."""
        config = self.run.config.model_dump(mode="json", exclude={"membership", "evaluation_set"})
        files = {"federation.json": (self.run.path / "federation.json").read_text()}
        return self.store.open_run(self.run.config.name, self.run.digest, _flat(config), files, self.run.id)

    @cached_property
    def images(self) -> NDArray[np.uint8] | None:
        """The first images of the coordinator's evaluation set, or None where the config names none."""
        return evaluation_images(self.run.config)

    def _picture(self, number: int) -> Path:
        return self.run.path / "pictures" / f"round-{number:05d}.png"

    def _mark(self, number: int) -> Path:
        return self.run.round(number) / "logged.json"


def export(run: RunFolder) -> Path:
    """Write the newest committed backbone as a release folder below the run folder, and return it.

    Raises ConfigError for batch normalisation without an evaluation set, whose images give its statistics.
    """
    from wardround.backbones import save_release

    number = run.committed()[-1]
    folder = run.path / "release"
    provenance = {
        "federation": run.config.name,
        "protocol": run.protocol.model_dump(mode="json"),
        "protocol_digest": run.digest,
        "round": number,
        "sites": {site: figures["weight"] for site, figures in run.record(number).get("sites", {}).items()},
        "differential_privacy": guarantee(run),
        "versions": versions(),
    }
    images = evaluation_images(run.config) if run.config.backbone.norm == "batch" else None
    save_release(run.protocol, run.checkpoint(number).state, folder, provenance, images)
    return folder


def guarantee(run: RunFolder) -> str | dict[str, Any]:
    """Return what a release promises: "none", or unit, adjacency, delta, epsilon and the sentence that says it.

    Inside a site, epsilon is each site's own, as it declared it with its last folded update.
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


def evaluation_images(config: FederationConfig) -> NDArray[np.uint8] | None:
    """Return the images that the coordinator draws, [N, C, S, S], or None where it has none."""
    chosen = config.evaluation_set
    if chosen is None:
        return None
    from wardround.data import procedural_set, read_labelled

    if chosen.folder is not None and chosen.kind == "labelled":  # the config sees to it that the folder is named
        return read_labelled(chosen.folder, config.data).images
    return procedural_set(chosen.count, config.seed, config.data).images


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


def collapse_lines(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning for each site to whose backbone all images have come to look alike, as far as sites tell."""
    lines = []
    for site, declared in sites.items():
        rank, spread = declared["effective_rank"], declared["feature_spread"]
        if rank is None or spread is None or declared["images"] < FEWEST:
            continue
        if collapsed(rank, spread):
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
