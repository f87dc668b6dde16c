"""Drift: how far new images are from the first, by hand-computed distances; and only a level leaves."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny, write_labelled
from data_objects import some_pixels, write_dicom
from flwr.app import Message

from wardround import simulate as simulation
from wardround.client.drift import distance, distances, level_of, measured
from wardround.config import Protocol, SiteConfig, read_site
from wardround.config.site import ImagesConfig
from wardround.data import open_site
from wardround.plan import resolve
from wardround.server.run_folder import RunFolder
from wardround.server.tracking import drift_lines
from wardround.simulate import InProcessGrid, simulate
from wardround.ssl.devices import Machine

PLAN = resolve(tiny(data={"image_size": 16, "convert_channels": True}))


def test_a_distance_is_the_largest_gap_between_cumulative_shares() -> None:
    # Cumulative: 1/4, 2/4, 4/4 and 0, 0, 1/2, then 1 at 9; the gap is largest at 5: 4/4 - 1/2, and at 3: 2/4 - 0.
    assert distance({1: 1, 3: 1, 5: 2}, {5: 1, 9: 1}) == 0.5
    assert distance({1: 7}, {1: 2}) == 0.0
    assert distance({1: 7}, {2: 1}) == 1.0


def test_of_names_it_is_the_largest_gap_of_one_share() -> None:
    shares = ({"CR": 6, "DX": 2}, {"CR": 1, "DX": 1, "MR": 2})  # 3/4, 1/4, 0 and 1/4, 1/4, 1/2
    assert distance(*shares, ordered=False) == 0.5
    found = distances({"modality": Counter(shares[0])}, {"modality": Counter(shares[1])})
    assert found == {"modality": (0.5, 8, 4)}


@pytest.mark.parametrize(
    ("gap", "first", "second", "level"),
    [
        (0.25, 10_000, 10_000, "none"),
        (0.26, 10_000, 10_000, "some"),
        (0.51, 10_000, 10_000, "strong"),
        # 1.95 * sqrt((20 + 20) / (20 * 20)) = 0.6166
        (0.61, 20, 20, "none"),
        (0.62, 20, 20, "strong"),
        (1.0, 1000, 3, "none"),  # 1.95 * sqrt(1003 / 3000) = 1.13
        (1.0, 1000, 4, "strong"),  # 0.977
        (1.0, 0, 4, "none"),
    ],
)
def test_a_level_needs_a_distance_that_so_few_images_do_not_reach_by_chance(
    gap: float, first: int, second: int, level: str
) -> None:
    assert level_of(gap, first, second) == level


def test_chance_passes_about_as_seldom_as_is_said() -> None:
    draw = np.random.default_rng(0)
    passed = 0
    for _ in range(3000):
        first, second = (Counter(draw.integers(0, 64, size).tolist()) for size in (60, 30))
        passed += level_of(distance(first, second), 60, 30) != "none"
    assert passed <= 6  # 3 are expected at most


def write(folder: Path, numbers: range, brightness: int = 0, **elements: Any) -> None:
    for number in numbers:
        pixels = np.clip(some_pixels(number, (24, 24)).astype(int) // 2 + brightness, 0, 255).astype(np.uint8)
        write_dicom(folder / f"{number}.dcm", pixels, PatientID=f"p{number}", **elements)


def level(folder: Path, protocol: Protocol = PLAN.protocol) -> str:
    site = SiteConfig(format=1, name="lyon", images=ImagesConfig(folder=folder / "images"), work=folder / "work")
    return measured(site, protocol, PLAN.state, open_site(site, protocol.data), Machine(threads=1))


def test_images_like_the_first_ones_do_not_drift(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "images", range(40))
    assert level(tmp_path) == "none"
    write(tmp_path / "images", range(40, 80))
    assert level(tmp_path) == "none"
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"brightness": 100}, "intensity 1.00"),
        ({"Modality": "MR"}, "modality 1.00"),
        ({"brightness": 20}, "intensity"),
    ],
)
def test_another_scanner_is_noticed_and_named_in_the_sites_own_log(
    change: dict[str, Any], named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "images", range(40))
    level(tmp_path)
    write(tmp_path / "images", range(40, 60), **change)
    assert level(tmp_path) == "strong"
    (line,) = caplog.messages
    assert line.startswith("site 'lyon': 20 new images drift from the first ones, strong: ") and named in line


def test_another_size_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "images", range(40))
    level(tmp_path)
    for number in range(40, 60):
        write_dicom(tmp_path / f"images/{number}.dcm", some_pixels(number, (48, 60)) // 2, PatientID=f"p{number}")
    assert level(tmp_path) == "strong" and "side 1.00" in caplog.text


def test_what_only_the_backbone_sees_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new ones have the means, spreads, size and modality of the first, their pixels sorted."""
    write(tmp_path / "images", range(60))
    level(tmp_path)
    for number in range(60, 100):
        pixels = np.sort(some_pixels(number, (24, 24)) // 2, axis=None).reshape(24, 24)
        write_dicom(tmp_path / f"images/{number}.dcm", pixels, PatientID=f"p{number}")
    assert level(tmp_path) == "strong"
    assert "features 1.00" in caplog.text


def test_the_answer_is_kept_while_the_new_images_stay_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "images", range(40))
    level(tmp_path)
    write(tmp_path / "images", range(40, 60), brightness=100)
    level(tmp_path)
    monkeypatch.setattr("wardround.client.drift.embedded", None)  # called, it would fail
    assert level(tmp_path) == "strong" and len(caplog.messages) == 1
    for number in range(40, 60):
        (tmp_path / f"images/{number}.dcm").unlink()
    assert level(tmp_path) == "none"


def test_what_is_kept_is_for_the_site_alone_and_names_no_file(tmp_path: Path) -> None:
    write(tmp_path / "images", range(6))
    level(tmp_path)
    (path,) = (tmp_path / "work/drift").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    kept = json.loads(path.read_text())
    assert len(kept["files"]) == 6 and kept["counts"]["modality"] == [["CR", 6]]
    keys = [sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "images").iterdir()]
    assert not [key for key in keys if key in path.read_text()]  # keyed: whoever has an image cannot ask if it was here
    path.write_bytes(b"{cut")
    assert level(tmp_path) == "none"  # counts as the first index again


# A whole federation: images come and go between two rounds.


def two_rounds(folder: Path, store: str, **config: Any) -> RunFolder:
    """Run two rounds; before the second, 20 images come to Lyon, and in Oslo three come and two patients opt out."""
    for site in ("lyon", "oslo"):
        write(folder / "data" / site, range(40))

    class Changing(InProcessGrid):
        def _answer(self, message: Message) -> Message:
            site, path = self.files[message.metadata.dst_node_id]
            if (site, message.metadata.group_id) == ("lyon", "2"):
                write(folder / "data/lyon", range(40, 60), brightness=100)
            if (site, message.metadata.group_id) == ("oslo", "2"):
                write(folder / "data/oslo", range(40, 43))
                (path.parent / "opt_out.txt").write_text("p3\np4\n")
                path.write_text(path.read_text().replace("[images]\n", '[images]\nopt_out = "opt_out.txt"\n'))
            return super()._answer(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "InProcessGrid", Changing)
        made = tiny(training={"rounds": 2, "local_steps": 1}, **config)
        return simulate(made, folder / "data", folder / "run", store, threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: str) -> RunFolder:
    return two_rounds(tmp_path_factory.mktemp("changing"), store)


def told(run: RunFolder, site: str, figure: str) -> list[Any]:
    return [run.record(number)["sites"][site][figure] for number in (1, 2)]


def test_what_comes_between_two_rounds_takes_part_in_the_next_and_who_opts_out_does_not(finished: RunFolder) -> None:
    assert told(finished, "lyon", "images") == [40, 60]
    assert told(finished, "oslo", "images") == [40, 41]
    found = open_site(read_site(finished.path / "sites/oslo/site.toml"), finished.config.data)
    assert (found.index.opted_out, found.num_images) == (2, 41)


def test_a_level_leaves_and_the_coordinator_is_told_when_it_changes(finished: RunFolder) -> None:
    assert told(finished, "lyon", "drift") == ["none", "strong"]
    assert told(finished, "oslo", "drift") == ["none", "none"]
    one, two = (finished.record(number)["sites"] for number in (1, 2))
    (line,) = drift_lines(two, [one])
    assert line.startswith("warning: site 'lyon': its new images drift from those that it began with: strong. ")
    assert drift_lines(two, [one, two]) == drift_lines(one, []) == []


def test_where_privacy_withholds_what_is_measured_not_even_the_level_leaves(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    privacy = {"unit": "site", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "cohort": 2, "noise": "site"}
    run = two_rounds(tmp_path, store, name="private", privacy=privacy, aggregation={"weights": "uniform"})
    assert told(run, "lyon", "drift") == [None, None]
    assert "site 'lyon': 20 new images drift" in caplog.text  # the site itself is told


def test_a_labelled_folders_images_say_of_no_modality(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path / "images", {"lyon": 10})
    assert folder.is_dir() and level(tmp_path) == "none"
    (path,) = (tmp_path / "work/drift").iterdir()
    assert json.loads(path.read_text())["counts"]["modality"] == [["not stated", 6]]
