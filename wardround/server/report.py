"""A run folder's report: one HTML page, and the same with its figures in MLflow."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from wardround.downstream.by_round import look
from wardround.errors import TrackingError
from wardround.registry import release
from wardround.registry.durable import write_file
from wardround.registry.mlflow_store import Store
from wardround.report.joined import read_compared
from wardround.report.page import Page, page_of
from wardround.server.history import history_of
from wardround.server.release import evaluation_set
from wardround.server.run_folder import RunFolder, open_run

PAGE = "report.html"
FOLDER = "report"  # in MLflow


def write_report(path: Path, out: Path | None = None, scores: Sequence[Path] = ()) -> tuple[Path, str]:
    """Write the page of a run folder, by default into it; return where it is, and in a line what MLflow has of it.

    `scores` are what `wardround evaluate --out` wrote of the run's release. A run may still be going on: the page is of
    what is committed. MLflow is a record: where it does not answer, the page is there all the same, and the line says
    so. Raises what reading the run, its evaluation set and the scores raises; nothing is written then.
    """
    run = open_run(path)
    history = history_of(run)
    compared = read_compared(scores, list(history.members), _released(run))
    seen = None
    if run.config.evaluation_set is not None:
        images, sites = evaluation_set(run.config), list(history.members)
        seen = look(run.protocol, run.committed(), lambda number: dict(run.checkpoint(number).state), images, sites)
    # A page is handed on: what the folder is called on this machine is nobody's business.
    page = page_of(history, seen, compared, "RUN" if path.is_absolute() else str(path))
    html = page.html(datetime.now(UTC), history.software["wardround"])
    written = path / PAGE if out is None else out
    write_file(written, html.encode())
    return written, _log(run, page, html)


def _released(run: RunFolder) -> list[str]:
    """Return the hashes of the weights that a run has released, of the newest round and of earlier ones."""
    folders = [run.path / "release", *sorted((run.path / "releases").glob("[0-9]*"))]
    return [release.check(folder)[release.WEIGHTS] for folder in folders if folder.exists()]


def _log(run: RunFolder, page: Page, html: str) -> str:
    """Put page and figures into the run's record in MLflow; return what came of it."""
    record = next(filter(None, map(run.logged, reversed(run.committed()[1:]))), None)
    if record is None:
        return "not in MLflow, which has no round of this run yet; make the page again once it has"
    files = {f"{FOLDER}/{PAGE}": html, **{f"{FOLDER}/{figure.name}.svg": figure.svg for figure in page.figures}}
    try:
        Store(run.tracking).log_texts(record, files)
    except TrackingError as error:
        return f"warning: not in MLflow: {error} Make the page again once it answers."
    return f"in MLflow, below {FOLDER}/ of the federation's run"
