"""Runs, releases and their names in MLflow.

A federation is an experiment. A released name is an experiment of its own, because whoever may
download a release may read all of its experiment. What MLflow cannot do now raises TrackingError
within seconds: training goes on, and the caller logs the round later by the same call.
"""

import difflib
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from mlflow.entities import Metric, Param
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from PIL import Image

from wardround.errors import CheckpointError, ConfigError, TrackingError
from wardround.registry import release, signing
from wardround.registry.durable import new_folder
from wardround.registry.mlflow_connection import Connection

QUICK = (10, 0)  # seconds for an answer, and retries: a round's record is a few kilobytes
PATIENT = (300, 2)  # a server answers an upload only when its own store has it
ROUND = "round"  # the metric that marks a round as logged
TAG = "wardround."  # before all that a version is tagged with
DIGEST, FILES, SIGNED, METRIC = f"{TAG}digest", f"{TAG}files", f"{TAG}signed_by", f"{TAG}metric."
_BATCH = {"metrics": 1000, "params": 100}  # MLflow's limits for one request
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[A-Za-z][A-Za-z0-9_-]{0,62}")  # MLflow keeps 'latest' and 'v1' for itself
_REFERENCE = re.compile(rf"({_NAME.pattern})(?:@({_ALIAS.pattern})|/(\d+))")


@dataclass(frozen=True)
class ModelRow:
    """One version of a released name."""

    name: str
    version: str
    aliases: tuple[str, ...]
    when: datetime  # UTC
    round: int | None
    digest: str  # of the release's files
    metrics: dict[str, float]
    tags: dict[str, str]  # all that Wardround tagged it with, without the prefix


class Store(Connection):
    """What Wardround keeps in one MLflow."""

    def open_run(
        self, federation: str, protocol: str, params: Mapping[str, str], files: Mapping[str, str], folder: str = ""
    ) -> str:
        """Return the id of the run of a federation, protocol digest and run folder, made if it is not there.

        Asked again, it finds the same run and sets it running; parameters keep their first value,
        as MLflow has it, and files (name -> text) are written anew.
        """
        tags = {"wardround.protocol": protocol, "wardround.folder": folder}
        with self.talk(QUICK, create=True) as client:
            experiment = self._experiment(client, federation)
            where = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
            if found := client.search_runs([experiment], where, max_results=1):
                run = found[0]
                client.update_run(run.info.run_id, status="RUNNING")
            else:
                run = client.create_run(experiment, tags=tags, run_name=f"{federation}-{protocol[:8]}")
            new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
            for start in range(0, len(new), _BATCH["params"]):
                client.log_batch(run.info.run_id, params=new[start : start + _BATCH["params"]])
            for name, text in files.items():
                client.log_text(run.info.run_id, text, name)
            return str(run.info.run_id)

    def log_round(self, run: str, round: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Log a round's metrics at step `round`, and its pictures, which MLflow shows by step.

        Rounds come in order. A round that is logged already is left as it is, so that a caller who
        crashed before noting it may log it again; a crash in between leaves at most a picture twice.
        """
        with self.talk(QUICK) as client:
            if client.get_run(run).data.metrics.get(ROUND, -1) >= round:
                return
            for key, path in pictures.items():
                with Image.open(path) as image:
                    client.log_image(run, image, key=key, step=round)
            now = int(time.time() * 1000)
            # Last, since it says that all the rest is there.
            points = [Metric(key, float(value), now, round) for key, value in {**metrics, ROUND: round}.items()]
            _log_points(client, run, points)

    def log_texts(self, run: str, files: Mapping[str, str]) -> None:
        """Keep texts among a run's files, by their paths there; what has the same path is written anew."""
        with self.talk(QUICK) as client:
            for name, text in files.items():
                client.log_text(run, text, name)

    def close_run(self, run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Mark a run as ended."""
        with self.talk(QUICK) as client:
            client.set_terminated(run, status)

    def register(
        self,
        folder: Path,
        name: str,
        alias: str,
        run: str | None,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> str:
        """Upload a release folder under a name, point the alias at it, and return its version.

        The same files under the same name are registered once: asked again, only the alias is set.
        Tags are kept as `wardround.<tag>`, beside them who signed it. Raises ConfigError for a
        name that MLflow could not refer to, CheckpointError for a folder that is no whole release.
        """
        if not _NAME.fullmatch(name) or not _ALIAS.fullmatch(alias):
            raise ConfigError(
                f"model '{name}@{alias}': expected letters, digits, '.', '_' or '-', and an alias that starts with a "
                "letter and is neither 'latest' nor 'v1'; choose another name."
            )
        hashes = release.check(folder)
        signed = signing.check(folder, hashes, name)
        all_tags = {
            **{f"{TAG}{key}": str(value) for key, value in tags.items()},
            **{f"{METRIC}{key}": repr(float(value)) for key, value in metrics.items()},
            DIGEST: release.digest(hashes),
            FILES: json.dumps(hashes, sort_keys=True),
            **({SIGNED: signed} if signed else {}),
        }
        with self.talk(QUICK, create=True) as client:
            version = _version_with(client, name, all_tags[DIGEST])
            if version is None:
                model = self._upload(client, folder, name, run, all_tags[DIGEST])
                if run is not None:  # MLflow takes a model's metrics by way of a run only: beside its own curves
                    now, of = int(time.time() * 1000), model.model_id
                    points = [Metric(f"release/{key}", float(value), now, 0, of) for key, value in metrics.items()]
                    _log_points(client, run, points)
                version = self._new_version(client, model, name, run, all_tags)
            client.set_registered_model_alias(name, alias, version)
        return version

    def pull(self, reference: str, to: Path, trust: str | None = None) -> Path:
        """Download `NAME@alias` or `NAME/version` as the folder `to`, compared with the hashes it was registered with.

        `trust` pins who may have signed it, by fingerprint; unset, whoever signed it is taken. The folder appears
        whole or not at all; one that holds this very release already is left alone.
        Raises ConfigError for a reference that names nothing, with the nearest names, and
        CheckpointError for files that differ, another signer, or a folder that holds something else.
        """
        with self.talk(QUICK) as client:
            version = _resolve(client, reference)
            expected = _hashes(version, reference)
            if to.is_dir() and any(to.iterdir()):
                if release.file_hashes(to) != expected:
                    raise CheckpointError(f"{to}: holds other files than '{reference}'. Name a new folder.")
                signing.check(to, expected, version.name, trust)
                return to
            with new_folder(to) as aside:
                self._download(client, version, "", aside)
                found = release.check(aside)
                release.compare(to, found, expected)
                if extra := sorted(found.keys() - expected.keys()):
                    raise CheckpointError(f"model '{reference}': holds '{extra[0]}', which nobody registered; refused.")
                signing.check(aside, found, version.name, trust, reference)
        return to

    def read(self, reference: str, name: str) -> bytes:
        """Return one file of a release, compared with the hash it was registered with. Raises as `pull` does."""
        with self.talk(QUICK) as client, TemporaryDirectory() as folder:
            version = _resolve(client, reference)
            expected = _hashes(version, reference)
            if name not in expected:
                raise CheckpointError(f"model '{reference}': has no '{name}'; another release of Wardround made it.")
            self._download(client, version, name, Path(folder))
            release.compare(Path(folder), release.file_hashes(Path(folder)), {name: expected[name]})
            return (Path(folder) / name).read_bytes()

    def resolve(self, reference: str) -> tuple[str, str]:
        """Return the name and the version that a reference means. Raises ConfigError, with the nearest names."""
        with self.talk(QUICK) as client:
            found = _resolve(client, reference)
            return str(found.name), str(found.version)

    def promote(self, name: str, version: str, alias: str, tags: Mapping[str, str]) -> None:
        """Tag a version as `wardround.<tag>`, then point an alias at it."""
        with self.talk(QUICK) as client:
            for key, value in tags.items():
                client.set_model_version_tag(name, version, f"{TAG}{key}", value)
            client.set_registered_model_alias(name, alias, version)

    def models(self, name: str | None = None) -> list[ModelRow]:
        """Return every version that Wardround registered, of one name or of all, by name, the newest first."""
        with self.talk(QUICK) as client:
            aliases = {
                (model.name, str(version)): [alias for alias, v in model.aliases.items() if v == version]
                for model in _all_pages(client.search_registered_models)
                for version in set(model.aliases.values())
            }
            where = None if name is None else f"name = '{name}'"
            versions = [v for v in _all_pages(client.search_model_versions, where) if DIGEST in v.tags]
        versions.sort(key=lambda v: (v.name, -int(v.version)))
        return [_row(v, aliases.get((v.name, str(v.version)), [])) for v in versions]

    def _download(self, client: MlflowClient, version: Any, name: str, to: Path) -> None:
        """Download one file of a version, or with an empty name all of them."""
        location = client.get_model_version_download_uri(version.name, version.version)
        with self.talk(PATIENT):  # a lost connection is an OSError too, and no fault of the disk
            get_artifact_repository(location, tracking_uri=self.uri).download_artifacts(name, str(to))

    def _upload(self, client: MlflowClient, folder: Path, name: str, run: str | None, digest: str) -> Any:
        """Return MLflow's model for a release, its files uploaded; one that an earlier, cut call left is taken up."""
        experiment = self._experiment(client, f"releases/{name}")
        found = client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'")
        model = found[0] if found else client.create_logged_model(experiment, name, run, {DIGEST: digest})
        with self.talk(PATIENT):
            client.log_model_artifacts(model.model_id, str(folder))
        return client.finalize_logged_model(model.model_id, "READY")

    def _new_version(self, client: MlflowClient, model: Any, name: str, run: str | None, tags: dict[str, str]) -> str:
        """Give an uploaded model the next version of its name."""
        if name not in _names(client):
            client.create_registered_model(name)
        made = client.create_model_version(
            name,
            # Not `models:/<id>`: a SQLite store looks that up at MLflow's global address instead of its own.
            model.artifact_location,
            run_id=run,
            tags=tags,
            await_creation_for=0,
            model_id=model.model_id if self.database is None else None,
        )
        return str(made.version)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        """Return the id of an experiment, made if it is not there."""
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage != "active":
                raise TrackingError(f"MLflow at {self.shown}: the experiment '{name}' is deleted; restore it there.")
            return str(found.experiment_id)
        location = None
        if self.database is not None:  # else MLflow writes artifacts to wherever the command was started
            location = (self.database.parent / "mlartifacts" / name).as_uri()
        return str(client.create_experiment(name, artifact_location=location))


def _log_points(client: MlflowClient, run: str, points: list[Metric]) -> None:
    """Log metrics in order, in as many requests as MLflow's limit asks for."""
    for start in range(0, len(points), _BATCH["metrics"]):
        client.log_batch(run, metrics=points[start : start + _BATCH["metrics"]])


def _version_with(client: MlflowClient, name: str, digest: str) -> str | None:
    """Return the version of a name that holds these files, if there is one."""
    versions = _all_pages(client.search_model_versions, f"name = '{name}'")
    return next((str(v.version) for v in versions if v.tags.get(DIGEST) == digest), None)


def _resolve(client: MlflowClient, reference: str) -> Any:
    """Return MLflow's model version for `NAME@alias` or `NAME/version`. Raises ConfigError, with the nearest names."""
    parts = _REFERENCE.fullmatch(reference.removeprefix("models:/"))
    if parts is None:
        raise ConfigError(f"model '{reference}': expected NAME@alias or NAME/version; 'wardround models' lists them.")
    name, alias, version = parts.groups()
    if name not in (names := _names(client)):
        raise ConfigError(f"model '{reference}': there is no '{name}'; {_nearest(name, names)}.")
    versions = {str(v.version): v for v in _all_pages(client.search_model_versions, f"name = '{name}'")}
    if alias is not None:
        aliases = client.get_registered_model(name).aliases
        if alias not in aliases:
            raise ConfigError(f"model '{reference}': '{name}' has no alias '{alias}'; {_nearest(alias, aliases)}.")
        version = str(aliases[alias])
    if version not in versions:
        raise ConfigError(f"model '{reference}': '{name}' has no version {version}; known: {', '.join(versions)}.")
    return versions[version]


def _hashes(version: Any, reference: str) -> release.Hashes:
    """Return the hashes that a version was registered with. Raises CheckpointError where it has none."""
    expected: release.Hashes = json.loads(version.tags.get(FILES, "{}"))
    if not expected:
        raise CheckpointError(f"model '{reference}': carries no hashes; it was not registered by Wardround.")
    return expected


def _nearest(wanted: str, known: Collection[str]) -> str:
    """Return what to type instead."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5) or sorted(known)[:10]
    return f"the nearest are: {', '.join(near)}" if near else "there are none yet"


def _names(client: MlflowClient) -> set[str]:
    """Return every registered name."""
    return {model.name for model in _all_pages(client.search_registered_models)}


def _all_pages(search: Callable[..., Any], where: str | None = None) -> Iterator[Any]:
    """Give what a search finds, page by page."""
    token = None
    while True:
        page = search(where, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _row(version: Any, aliases: list[str]) -> ModelRow:
    """Return a model version as a row."""
    tags = {key.removeprefix(TAG): value for key, value in version.tags.items() if key.startswith(TAG)}
    metrics = {key.removeprefix(METRIC): float(value) for key, value in version.tags.items() if key.startswith(METRIC)}
    round = tags.get("round")
    return ModelRow(
        name=version.name,
        version=str(version.version),
        aliases=tuple(sorted(aliases)),
        when=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        round=int(round) if round is not None else None,
        digest=version.tags[DIGEST],
        metrics=metrics,
        tags=tags,
    )
