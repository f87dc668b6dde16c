"""A checkpoint that the disk damaged: the one before it is used, and nothing is lost that sites still have."""

from pathlib import Path

import pytest
from conftest import tiny
from honest_sites import SITES, Sites, final, ignore, make_run

from wardround.errors import CheckpointError
from wardround.plan import resolve
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, create, open_run


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
