"""The page on a federation: one file, for everybody's eyes and ears, whatever the names in it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny, write_labelled
from honest_sites import SITES, Sites, ignore, make_run
from PIL import Image
from test_server_privacy import PATIENT, PrivateSites

from wardround.downstream.evaluate import compare
from wardround.errors import CheckpointError, ConfigError
from wardround.plan import resolve
from wardround.probe.evaluation import Evaluation
from wardround.registry.mlflow_store import Store
from wardround.report.curves import draw_losses
from wardround.report.drawing import SITES as COLOURS
from wardround.report.drawing import Palette
from wardround.server.history import history_of
from wardround.server.release import export
from wardround.server.report import write_report
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, create
from wardround.server.tracking import Tracking
from wardround.update import Refusal, Task

HOSTILE = "<img src=x onerror=alert(1)>"
PANELS = ["trained", "learned", "privacy", "images", "joining", "running", "provenance"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Missing(Sites):
    """Three sites, of which one cannot take part in round 2."""

    def answer(self, site: str, task: Task) -> bytes | Refusal:
        if (site, task.round) == ("wien", 2):
            return Refusal("budget", f"nothing left {HOSTILE}")
        return super().answer(site, task)


class Parsed(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.silent: list[str] = []  # pictures without a text alternative
        self.labels: list[str] = []
        self.open: list[bool] = []  # of each open element: whether it has a text alternative, or is in such a one
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {name: value or "" for name, value in attrs}
        self.tags.append((tag, said))
        label = said.get("aria-label", said.get("alt", "")) if tag == "img" or said.get("role") == "img" else ""
        self.labels += [label] if label else []
        inside = bool(label) or any(self.open[-1:])
        if tag in ("img", "svg") and not inside:
            self.silent.append(tag)
        self.text += " " if tag in ("td", "th") else ""
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(inside)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: str) -> RunFolder:
    """A run with a refusal, in MLflow, whose coordinator owns images of a class with a hostile name."""
    home = tmp_path_factory.mktemp("page")
    images = write_labelled(home / "images", {"lyon": 60, "oslo": 60, "bern": 20}, classes=("a", HOSTILE))
    owned = {"evaluation_set": {"kind": "labelled", "folder": str(images)}, "membership": {"min_sites": 2}}
    begun = make_run(home / "run", **owned)
    run_rounds(begun, Missing(begun), ignore)
    run = create(home / "run", resolve(tiny(**owned)), {site: f"in-process:{site}" for site in SITES}, store)
    export(run)
    Tracking(run).log()
    return run


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Path:
    written, kept = write_report(run.path)
    assert kept == "in MLflow, below report/ of the federation's run"
    return written


def test_one_file_has_every_panel_and_asks_nothing_of_the_network_or_of_a_script(page: Path) -> None:
    text = page.read_text()
    parsed = Parsed(text)
    assert [said["id"] for tag, said in parsed.tags if tag == "section"] == PANELS
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in parsed.tags}
    linked = [said[name] for _, said in parsed.tags for name in ("src", "href", "xlink:href") if name in said]
    assert linked and all(link.startswith(("#", "data:")) for link in linked)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)  # the names of SVG's vocabularies are no addresses
    assert str(page.parent) not in text


def test_every_picture_says_what_it_shows_and_has_its_numbers(page: Path) -> None:
    parsed = Parsed(page.read_text())
    assert parsed.silent == []
    figures = [said["id"] for tag, said in parsed.tags if tag == "figure"]
    assert len(parsed.labels) == len(figures) == parsed.text.count("The numbers") == 9
    assert "The sites' mean loss stayed at 0.500 between round 1 and round 2." in parsed.labels[0]
    assert any(label.startswith("Rounds without an update that was asked for: wien 1 of 2") for label in parsed.labels)
    identifiers = [said["id"] for _, said in parsed.tags if "id" in said]
    assert len(identifiers) == len(set(identifiers))


def test_names_and_reasons_from_outside_are_text_and_nothing_else(page: Path) -> None:
    parsed = Parsed(page.read_text())
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert f"budget: nothing left {HOSTILE}" in parsed.text  # a site's reason, in the table
    assert HOSTILE[:12] in parsed.text  # a class, in drawings


def test_mlflow_has_the_page_and_each_figure(page: Path, run: RunFolder) -> None:
    mark = json.loads((run.round(2) / "logged.json").read_bytes())
    with Store(run.tracking).talk((10, 0)) as client:
        names = {file.path for file in client.list_artifacts(mark["run"], "report")}
        assert client.get_run(mark["run"]).info.status == "RUNNING"  # as it was
    figures = {said["id"] for tag, said in Parsed(page.read_text()).tags if tag == "figure"}
    assert names == {"report/report.html"} | {f"report/{name.removeprefix('figure-')}.svg" for name in figures}


def test_a_site_has_one_colour_and_mark_in_every_figure() -> None:
    some = Palette(["oslo", "lyon"])
    assert (some.colour("lyon"), some.colour("oslo")) == COLOURS[:2]
    many = Palette([f"site-{number:02d}" for number in range(20)])
    assert len({(many.colour(site), many.mark(site)) for site in many.places}) == 20


def test_the_names_of_many_sites_leave_room_for_their_curves(tmp_path: Path) -> None:
    """matplotlib warns where they do not, and warnings are errors here."""
    sites = {f"hospital{number:03}": "" for number in range(40)}
    run = create(tmp_path / "run", resolve(tiny()), sites, "")
    run_rounds(run, Sites(run), ignore)
    page, _ = write_report(run.path)
    assert "and 29 more" in page.read_text()
    draw_losses({site: [(1, 0.5), (2, 0.4)] for site in sites}, tmp_path / "losses.png", "many")


def test_without_an_evaluation_set_and_scores_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    written, kept = write_report(run.path, tmp_path / "page.html")
    text = Parsed(written.read_text()).text
    assert "not in MLflow" in kept
    assert '[evaluation_set]\nkind = "labelled"' in text
    assert "wardround evaluate RUN --data DATA --by site --out scores.json \\\n  --against lyon=runs/lyon" in text
    assert "none: the coordinator may be able to reconstruct images" in text


def test_every_epsilon_stands_beside_its_unit_and_delta_and_what_is_withheld_is_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)
    run_rounds(run, PrivateSites(run), ignore)
    parsed = Parsed(write_report(run.path)[0].read_text())
    (finding,) = [label for label in parsed.labels if "ε" in label]
    assert finding == (
        "Until round 2 of 2, lyon has spent the most, ε = 2.500 under adding or removing one patient, at δ = 0.001; "
        "nobody has passed the ceiling of 8."
    )
    assert "Loss and effective rank at the sites are withheld" in parsed.text
    assert "figure-loss" not in {said.get("id") for _, said in parsed.tags}
    assert [point[1] for point in history_of(run).promise.spent["oslo"]] == [1.25, 2.5]  # type: ignore[union-attr]


def test_where_a_site_is_the_unit_no_figure_without_noise_is_on_the_page(tmp_path: Path) -> None:
    private = {"unit": "site", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "cohort": 3}
    run = make_run(tmp_path / "run", privacy=private, aggregation={"weights": "uniform"})
    run_rounds(run, Sites(run), ignore)
    history = history_of(run)
    assert history.last.loss is None
    assert all(one.loss is one.seconds is one.received is None for one in history.last.sites.values())
    assert all(member.images is None for member in history.members.values())
    assert history.promise is not None and list(history.promise.spent) == ["all sites"]
    assert history.promise.spent["all sites"][-1][1] == pytest.approx(8.0, abs=0.05)


@pytest.fixture(scope="module")
def scores(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `wardround evaluate RUN --by site --against lyon=…` writes; here the site's own is the untrained network."""
    from wardround.server.release import evaluation_set

    images = evaluation_set(run.config)
    images = dataclasses.replace(images, groups={"site": images.sites})
    found: dict[str, Any] = json.loads(compare(run.path / "release", images, fractions=(1.0,), draws=1).to_json())
    for kind in ("rows", "subgroups"):
        found[kind] += [{**row, "arm": "lyon"} for row in found[kind] if row["arm"] == "random"]
    return found


def written(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_what_joining_brought_is_the_difference_on_the_same_images(
    run: RunFolder, scores: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path / "scores.json", scores)
    parsed = Parsed(write_report(run.path, tmp_path / "page.html", [file])[0].read_text())
    found = Evaluation.from_json(file.read_text())
    gain = found.score("backbone") - found.score("random")
    cells = re.findall(r"lyon all test patients 28 / 14 .*?([+-]\d\.\d{3})", parsed.text)
    assert cells == [f"{gain:+.3f}"]
    assert "lyon its own test patients" in " ".join(parsed.text.split())
    assert any("sites the federation's backbone scores above" in label for label in parsed.labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"weights": "0" * 64}, "is of other weights"), ({"rows": 3}, "is not what 'wardround evaluate --out' writes")],
)
def test_scores_of_something_else_are_refused(
    run: RunFolder, scores: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        write_report(run.path, tmp_path / "page.html", [written(tmp_path / "scores.json", {**scores, **change})])
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_run_has_no_round_or_is_damaged_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="has committed no round yet"):
        write_report(run.path)
    run_rounds(run, Sites(run), ignore)
    manifest = run.round(2) / "checkpoint" / "manifest.json"
    whole = json.loads(manifest.read_text())
    for record in ({}, {**whole["record"], "seconds": "soon"}, {**whole["record"], "sites": {"lyon": None}}):
        manifest.write_text(json.dumps({**whole, "record": record}))
        with pytest.raises(CheckpointError, match=r"00002.*is damaged"):
            write_report(run.path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("night", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_draws_the_page_without_complaint(page: Path, tmp_path: Path, width: int, night: bool) -> None:
    """Only a browser shows that a person would see something: by day, by night, and on a telephone."""
    # A browser's window is 500 pixels wide at the least, a frame in it is as narrow as is asked.
    frame = (
        f'<meta name="color-scheme" content="light dark"><iframe src="{page.as_uri()}" width="{width}" height="2000">'
    )
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><style>* {{ margin: 0; border: 0 }}</style>{frame}</iframe>")
    options = ["--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    options += ["--force-dark-mode"] if night else []
    options += [f"--window-size={max(500, width)},2000", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *options, f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    seen = np.asarray(Image.open(tmp_path / "shot.png").convert("L"), float)[:, :width]
    paper = np.median(seen)
    assert paper < 40 if night else paper > 240
    drawn = np.abs(seen - paper) > 60
    assert 0.01 < drawn.mean() < 0.6
    assert not drawn[:, -4:].any()  # nothing is cut at the right
