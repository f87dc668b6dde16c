"""A connection to one MLflow, a server or an SQLite file: what fails is a TrackingError, within seconds."""

import contextlib
import logging
import os
import re
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import mlflow.telemetry
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from wardround.errors import ConfigError, TrackingError

mlflow.telemetry.set_telemetry_client()  # drops the one of an earlier import, by MONAI for instance
logging.getLogger("mlflow").setLevel(logging.ERROR)  # it reports each table that it creates

Patience = tuple[int, int]  # seconds for an answer, and retries


class Connection:
    """One MLflow: a server's address, or a SQLite file with its artifacts beside it.

    Its calls set MLflow's time limits in the environment while they last: use it from one thread.
    """

    def __init__(self, uri: str) -> None:
        """Take `http(s)://…`, `sqlite:///…` or a file's path; nothing is opened yet. Raises ConfigError."""
        self.database = None if uri.startswith(("http://", "https://")) else _database(uri)
        self.uri = uri if self.database is None else f"sqlite:///{self.database}"
        # A password in the address is for MLflow, not for a terminal.
        self.shown = re.sub(r"//[^/@]*@", "//", uri) if self.database is None else str(self.database)

    @contextlib.contextmanager
    def talk(self, patience: Patience, create: bool = False) -> Iterator[MlflowClient]:
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
                if self.database is not None:
                    _check_database(self.database, create)
                yield MlflowClient(self.uri, self.uri)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise TrackingError(f"MLflow at {self.shown}: {_reason(error)}") from error
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
            # Not mode=ro: what a kill left half written is taken back by whoever opens it next, and that writes.
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
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


def _reason(error: Exception) -> str:
    """Return in one line why MLflow did not do what was asked, and the remedy."""
    chain = (error, error.__cause__, error.__context__)
    if any(isinstance(cause, requests.ConnectionError | requests.Timeout) for cause in chain):
        return "does not answer. Start it, or correct the address."
    return " ".join(str(error).split())[:300]
