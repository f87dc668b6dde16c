"""A checkpoint that the disk damaged: the one before it is used, and nothing is lost that sites still have."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import tiny, write_labelled
from honest_sites import SITES, Cut, Sites, final, ignore, make_run

from wardround.client.app import run_task
from wardround.config import read_site
from wardround.errors import CheckpointError
from wardround.plan import resolve
from wardround.server.rounds import Ask, run_rounds
from wardround.server.run_folder import RunFolder, create, open_run
from wardround.server.status import Watch
from wardround.simulate import index_sites
from wardround.update import Refusal, Task


def damage(run: RunFolder, number: int) -> None:
    path = run.round(number) / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_the_round_before_a_damaged_checkpoint_is_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    whole = final(run)
    damage(run, 2)
    again = Sites(run)
    run_rounds(open_run(tmp_path / "run"), again, ignore)
    assert final(run) == whole
    assert {number for _, number in again.asked} == {2}
    assert "it is damaged" in capsys.readouterr().out
    assert len(list((tmp_path / "run/rounds").glob("damaged-00002-*"))) == 1


def test_several_damaged_checkpoints_are_set_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    whole = final(run)
    for number in (1, 2):
        damage(run, number)
    run_rounds(open_run(tmp_path / "run"), Sites(run), ignore)
    assert final(run) == whole


def test_a_noised_round_is_not_released_twice(tmp_path: Path) -> None:
    privacy = {"unit": "site", "epsilon": 50.0, "delta": 1e-3, "clip": 1.0, "cohort": 3}
    config = tiny(privacy=privacy, aggregation={"weights": "uniform"})
    run = create(tmp_path / "run", resolve(config), {site: site for site in SITES}, "")
    run_rounds(run, Sites(run), ignore)
    damage(run, 2)
    with pytest.raises(CheckpointError, match="releases the round twice"):
        run_rounds(open_run(tmp_path / "run"), Sites(run), ignore)


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_sites_that_are_a_round_ahead_of_a_damaged_checkpoint_replay_what_it_was_made_of(
    encoding: str, tmp_path: Path
) -> None:
    config = tiny(training={"rounds": 3}, encoding=encoding)
    data = write_labelled(tmp_path / "data", {"lyon": 9, "oslo": 7})

    def asking(out: Path, last: str | None = None) -> Ask:
        def ask(tasks: Mapping[str, Task]) -> Iterator[tuple[str, bytes | Refusal]]:
            for site, task in sorted(tasks.items()):
                yield site, run_task(read_site(out / "sites" / site / "site.toml"), task)
                if (site, task.round) == (last, 3):
                    raise Cut

        return ask

    runs = []
    for name in ("whole", "cut"):
        members = dict.fromkeys(index_sites(config, data, tmp_path / name, threads=1), "")
        runs.append(create(tmp_path / name, resolve(config), members, ""))
    whole, cut = runs
    run_rounds(whole, asking(whole.path), ignore)
    with pytest.raises(Cut):
        run_rounds(cut, asking(cut.path, "lyon"), ignore)  # which has done round 3, and oslo has not
    damage(cut, 2)
    run_rounds(open_run(cut.path), asking(cut.path), ignore)
    assert final(cut) == final(whole)
    trained = sorted(path.read_text() for path in cut.path.glob("sites/*/journal/*/round-*/trainings.json"))
    assert trained == ["1"] * 4, "nothing was trained twice"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{}"),
        ("run.json", "[]"),
        ("rounds/00002/cohort.json", '{"lyon'),
        ("rounds/00002/cohort.json", "[1]"),
        ("rounds/00002/closed.json", '{"upd'),
        ("rounds/00002/closed.json", '{"updates": {}}'),
        ("rounds/00001/checkpoint/manifest.json", "[]"),
        (
            "rounds/00001/checkpoint/manifest.json",
            '{"round": 1, "protocol": "", "state": "", "files": [], "record": {}}',
        ),
        (
            "rounds/00001/checkpoint/manifest.json",
            '{"round": 1, "protocol": "", "state": "", "files": {}, "record": {}}',
        ),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line_with_the_remedy(name: str, content: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    shutil.rmtree(run.round(2) / "checkpoint")
    (run.path / name).write_text(content)
    where = name.removesuffix("/manifest.json")
    with pytest.raises(CheckpointError, match=rf"{where}: .* Restore it from a copy[^\n]*\.$"):
        Watch(run.path).look()


def test_a_damaged_round_that_later_ones_began_from_is_not_told_to_be_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    for number, remedy in ((1, "; later rounds go on from it"), (2, ", or remove its round to train it again")):
        (run.round(number) / "checkpoint" / "manifest.json").write_text("{")
        with pytest.raises(CheckpointError, match=f"Restore it from a copy{remedy}"):
            run.record(number)
