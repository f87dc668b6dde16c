"""Runs, releases and their names in MLflow: the only file that imports it.

A federation is an experiment. A released name is an experiment of its own, because whoever may
download a release may read all of its experiment. What MLflow cannot do now raises TrackingError
within seconds: training goes on, and the caller logs the round later by the same call.
"""

import contextlib
import difflib
import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from wardround.errors import CheckpointError, ConfigError, WardroundError
from wardround.registry import release
from wardround.registry.durable import new_folder

# MLflow reads it when it is imported, and sends usage data otherwise; it takes DO_NOT_TRACK=1 for a no.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow.telemetry  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from PIL import Image  # noqa: E402

mlflow.telemetry.set_telemetry_client()  # drops the one of an earlier import, by MONAI for instance
logging.getLogger("mlflow").setLevel(logging.ERROR)  # it reports each table that it creates

QUICK = (10, 0)  # seconds for an answer, and retries: a round's record is a few kilobytes
PATIENT = (300, 2)  # a server answers an upload only when its own store has it
ROUND = "round"  # the metric that marks a round as logged
DIGEST, FILES, METRIC = "wardround.digest", "wardround.files", "wardround.metric."
_BATCH = {"metrics": 1000, "params": 100}  # MLflow's limits for one request
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ALIAS = re.compile(r"(?!latest$|v\d+$)[A-Za-z][A-Za-z0-9_-]{0,62}")  # MLflow keeps 'latest' and 'v1' for itself
_REFERENCE = re.compile(rf"({_NAME.pattern})(?:@({_ALIAS.pattern})|/(\d+))")


class TrackingError(WardroundError):
    """MLflow cannot be reached, or refuses."""


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


class Store:
    """One MLflow: a server's address, or a SQLite file with its artifacts beside it.

    Its calls set MLflow's time limits in the environment while they last: use it from one thread.
    """

    def __init__(self, uri: str) -> None:
        """Take `http(s)://…`, `sqlite:///…` or a file's path; nothing is opened yet. Raises ConfigError."""
        self._database = None if uri.startswith(("http://", "https://")) else _database(uri)
        self.uri = uri if self._database is None else f"sqlite:///{self._database}"
        # A password in the address is for MLflow, not for a terminal.
        self._shown = re.sub(r"//[^/@]*@", "//", uri) if self._database is None else str(self._database)

    def open_run(
        self, federation: str, protocol: str, params: Mapping[str, str], files: Mapping[str, str], folder: str = ""
    ) -> str:
        """Return the id of the run of a federation, protocol digest and run folder, made if it is not there.

        Asked again, it finds the same run and sets it running; parameters keep their first value,
        as MLflow has it, and files (name -> text) are written anew.
        """
        tags = {"wardround.protocol": protocol, "wardround.folder": folder}
        with self._talk(QUICK, create=True) as client:
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

    def log_round(
        self, run: str, round: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        """Log a round's metrics at step `round`, and its pictures, which MLflow shows by step.

        Rounds come in order. A round that is logged already is left as it is, so that a caller who
        crashed before noting it may log it again; a crash in between leaves at most a picture twice.
        """
        with self._talk(QUICK) as client:
            if client.get_run(run).data.metrics.get(ROUND, -1) >= round:
                return
            for key, path in pictures.items():
                with Image.open(path) as image:
                    client.log_image(run, image, key=key, step=round)
            now = int(time.time() * 1000)
            # Last, since it says that all the rest is there.
            points = [Metric(key, float(value), now, round) for key, value in {**metrics, ROUND: round}.items()]
            for start in range(0, len(points), _BATCH["metrics"]):
                client.log_batch(run, metrics=points[start : start + _BATCH["metrics"]])

    def close_run(self, run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Mark a run as ended."""
        with self._talk(QUICK) as client:
            client.set_terminated(run, status)

    def register(
        self, folder: Path, name: str, alias: str, run: str | None, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        """Upload a release folder under a name, point the alias at it, and return its version.

        The same files under the same name are registered once: asked again, only the alias is set.
        Tags are kept as `wardround.<tag>`; a tag `round` shows in `models()`. Raises ConfigError for a
        name that MLflow could not refer to, CheckpointError for a folder that is no whole release.
        """
        if not _NAME.fullmatch(name) or not _ALIAS.fullmatch(alias):
            raise ConfigError(
                f"model '{name}@{alias}': expected letters, digits, '.', '_' or '-', and an alias that starts with a "
                "letter and is neither 'latest' nor 'v1'; choose another name."
            )
        hashes = release.check(folder)
        all_tags = {
            **{f"wardround.{key}": str(value) for key, value in tags.items()},
            **{f"{METRIC}{key}": repr(float(value)) for key, value in metrics.items()},
            DIGEST: release.digest(hashes),
            FILES: json.dumps(hashes, sort_keys=True),
        }
        with self._talk(PATIENT, create=True) as client:
            version = _version_with(client, name, all_tags[DIGEST])
            if version is None:
                version = self._new_version(client, folder, name, run, all_tags)
            client.set_registered_model_alias(name, alias, version)
        return version

    def pull(self, reference: str, to: Path) -> Path:
        """Download `NAME@alias` or `NAME/version` as the folder `to`, compared with the hashes it was registered with.

        The folder appears whole or not at all; one that holds this very release already is left alone.
        Raises ConfigError for a reference that names nothing, with the nearest names, and
        CheckpointError for files that differ or a folder that holds something else.
        """
        with self._talk(PATIENT) as client:
            version = _resolve(client, reference)
            expected: release.Hashes = json.loads(version.tags.get(FILES, "{}"))
            if not expected:
                raise CheckpointError(f"model '{reference}': carries no hashes; it was not registered by Wardround.")
            if to.is_dir() and any(to.iterdir()):
                if release.file_hashes(to) != expected:
                    raise CheckpointError(f"{to}: holds other files than '{reference}'. Name a new folder.")
                return to
            location = client.get_model_version_download_uri(version.name, version.version)
            if self._database is None and urlsplit(location).scheme in ("", "file"):
                raise CheckpointError(f"model '{reference}': the server points at this machine's own disk; refused.")
            with new_folder(to) as aside:
                with self._talk(PATIENT):  # a lost connection is an OSError too, and no fault of the disk
                    get_artifact_repository(location, tracking_uri=self.uri).download_artifacts("", str(aside))
                found = release.check(aside)
                release.compare(to, found, expected)
                if extra := sorted(found.keys() - expected.keys()):
                    raise CheckpointError(f"model '{reference}': holds '{extra[0]}', which was not registered; refused.")
        return to

    def models(self) -> list[ModelRow]:
        """Return every version that Wardround registered, by name, the newest first."""
        with self._talk(QUICK) as client:
            aliases = {
                (model.name, str(version)): [alias for alias, v in model.aliases.items() if v == version]
                for model in _all_pages(client.search_registered_models)
                for version in set(model.aliases.values())
            }
            versions = [v for v in _all_pages(client.search_model_versions) if DIGEST in v.tags]
        versions.sort(key=lambda v: (v.name, -int(v.version)))
        return [_row(v, aliases.get((v.name, str(v.version)), [])) for v in versions]

    def _new_version(
        self, client: MlflowClient, folder: Path, name: str, run: str | None, tags: dict[str, str]
    ) -> str:
        """Upload a release and give it the next version of its name."""
        experiment = self._experiment(client, f"releases/{name}")
        # What an earlier call uploaded before it was cut off; the upload is done again, over it.
        found = client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{tags[DIGEST]}'")
        model = found[0] if found else client.create_logged_model(experiment, name, run, {DIGEST: tags[DIGEST]})
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        with _unless("RESOURCE_ALREADY_EXISTS"):
            client.create_registered_model(name)
        made = client.create_model_version(
            name,
            # Not `models:/<id>`: a SQLite store looks that up at MLflow's global address instead of its own.
            model.artifact_location,
            run_id=run,
            tags=tags,
            await_creation_for=0,
            model_id=model.model_id if self._database is None else None,
        )
        return str(made.version)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        """Return the id of an experiment, made if it is not there."""
        location = None
        if self._database is not None:  # else MLflow writes artifacts to wherever the command was started
            location = (self._database.parent / "mlartifacts" / name).as_uri()
        with _unless("RESOURCE_ALREADY_EXISTS"):
            return str(client.create_experiment(name, artifact_location=location))
        found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(f"MLflow at {self._shown}: the experiment '{name}' is deleted; restore it there.")
        return str(found.experiment_id)

    @contextlib.contextmanager
    def _talk(self, patience: tuple[int, int], create: bool = False) -> Iterator[MlflowClient]:
        """Give a client whose calls take so many seconds and retries; what fails is a TrackingError."""
        if self._database is not None:
            _check_database(self._database, create)
        settings = {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(patience[0]),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(patience[1]),
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()).lower(),
        }
        before = {key: os.environ.get(key) for key in settings}
        os.environ.update(settings)
        try:
            yield MlflowClient(self.uri, self.uri)
        except (MlflowException, OSError) as error:
            raise TrackingError(f"MLflow at {self._shown}: {_reason(error)}") from error
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
