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
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from wardround.errors import CheckpointError, ConfigError, TrackingError
from wardround.registry import release
from wardround.registry.durable import new_folder

# MLflow reads it when it is imported, and sends usage data otherwise; it takes DO_NOT_TRACK=1 for a no.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow.telemetry
import requests
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

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

    def log_round(self, run: str, round: int, metrics: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
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
            _log_points(client, run, points)

    def close_run(self, run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Mark a run as ended."""
        with self._talk(QUICK) as client:
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
        with self._talk(QUICK, create=True) as client:
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

    def pull(self, reference: str, to: Path) -> Path:
        """Download `NAME@alias` or `NAME/version` as the folder `to`, compared with the hashes it was registered with.

        The folder appears whole or not at all; one that holds this very release already is left alone.
        Raises ConfigError for a reference that names nothing, with the nearest names, and
        CheckpointError for files that differ or a folder that holds something else.
        """
        with self._talk(QUICK) as client:
            version = _resolve(client, reference)
            expected: release.Hashes = json.loads(version.tags.get(FILES, "{}"))
            if not expected:
                raise CheckpointError(f"model '{reference}': carries no hashes; it was not registered by Wardround.")
            if to.is_dir() and any(to.iterdir()):
                if release.file_hashes(to) != expected:
                    raise CheckpointError(f"{to}: holds other files than '{reference}'. Name a new folder.")
                return to
            location = client.get_model_version_download_uri(version.name, version.version)
            with new_folder(to) as aside:
                with self._talk(PATIENT):  # a lost connection is an OSError too, and no fault of the disk
                    get_artifact_repository(location, tracking_uri=self.uri).download_artifacts("", str(aside))
                found = release.check(aside)
                release.compare(to, found, expected)
                if extra := sorted(found.keys() - expected.keys()):
                    raise CheckpointError(f"model '{reference}': holds '{extra[0]}', which nobody registered; refused.")
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

    def _upload(self, client: MlflowClient, folder: Path, name: str, run: str | None, digest: str) -> Any:
        """Return MLflow's model for a release, its files uploaded; one that an earlier, cut call left is taken up."""
        experiment = self._experiment(client, f"releases/{name}")
        found = client.search_logged_models([experiment], f"tags.`{DIGEST}` = '{digest}'")
        model = found[0] if found else client.create_logged_model(experiment, name, run, {DIGEST: digest})
        with self._talk(PATIENT):
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
            model_id=model.model_id if self._database is None else None,
        )
        return str(made.version)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        """Return the id of an experiment, made if it is not there."""
        if found := client.get_experiment_by_name(name):
            if found.lifecycle_stage != "active":
                raise TrackingError(f"MLflow at {self._shown}: the experiment '{name}' is deleted; restore it there.")
            return str(found.experiment_id)
        location = None
        if self._database is not None:  # else MLflow writes artifacts to wherever the command was started
            location = (self._database.parent / "mlartifacts" / name).as_uri()
        return str(client.create_experiment(name, artifact_location=location))

    @contextlib.contextmanager
    def _talk(self, patience: tuple[int, int], create: bool = False) -> Iterator[MlflowClient]:
        """Give a client whose calls take so many seconds and retries; what fails is a TrackingError."""
        settings = {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(patience[0]),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(patience[1]),
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()).lower(),
        }
        before = {key: os.environ.get(key) for key in settings}
        os.environ.update(settings)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's own use of SQLAlchemy
                if self._database is not None:
                    _check_database(self._database, create)
                yield MlflowClient(self.uri, self.uri)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise TrackingError(f"MLflow at {self._shown}: {_reason(error)}") from error
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def _database(uri: str) -> Path:
    """Return the SQLite file that a URI or a path means. Raises ConfigError."""
    text = unquote(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else uri
    if "://" in text or set(text) & set("?%"):  # SQLAlchemy would read options and escapes into a path
        shown = re.sub(r"//[^/@]*@", "//", uri)
        raise ConfigError(
            f"MLflow address '{shown}': expected http(s)://HOST:PORT, sqlite:///FILE or a path without '?' and '%'."
        )
    path = Path(text).expanduser().absolute()
    return path / "mlflow.db" if path.is_dir() else path


def _check_database(path: Path, create: bool) -> None:
    """Raise TrackingError for a file that cannot be opened: MLflow would try it again for minutes."""
    try:
        if path.exists():
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                connection.execute("PRAGMA schema_version")
        elif create:
            _make_database(path)
        else:
            raise TrackingError(f"MLflow at {path}: there is no such file. Name the one that the federation wrote.")
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(f"MLflow at {path}: cannot be opened: {error}. Name another file.") from error


def _make_database(path: Path) -> None:
    """Make an empty MLflow database that appears whole or not at all.

    Killed while it makes its tables, MLflow leaves a file that it then refuses for ever ("table logged_models
    already exists").
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        MlflowClient(f"sqlite:///{aside}", f"sqlite:///{aside}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was first; its rows stay
            os.link(aside, path)


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
    metrics = {key.removeprefix(METRIC): float(value) for key, value in version.tags.items() if key.startswith(METRIC)}
    round = version.tags.get("wardround.round")
    return ModelRow(
        name=version.name,
        version=str(version.version),
        aliases=tuple(sorted(aliases)),
        when=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        round=int(round) if round is not None else None,
        digest=version.tags[DIGEST],
        metrics=metrics,
    )


def _reason(error: Exception) -> str:
    """Return in one line why MLflow did not do what was asked, and the remedy."""
    chain = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, requests.ConnectionError | requests.Timeout) for cause in chain):
        return "does not answer. Start it, or correct the address."
    return " ".join(str(error).split())[:300]
