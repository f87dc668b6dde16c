"""What the coordinator takes, shows and hands on where patients are the privacy unit."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from honest_sites import Cut, Sites, ignore, make_run

from wardround.errors import ConfigError, UpdateError
from wardround.report.tables import rounds_table
from wardround.server import rounds, tracking
from wardround.server.release import export, guarantee
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import open_run
from wardround.update import Declared, Refusal, Task, Update

PATIENTS = {"lyon": 40, "oslo": 60, "wien": 100}
PATIENT = {
    "privacy": {"unit": "patient", "epsilon": 8.0, "delta": 1e-3},
    "membership": {"units": PATIENTS, "min_sites": 2},
}


class PrivateSites(Sites):
    """Three sites that declare nothing measured."""

    def update(self, site: str, task: Task) -> Update:
        head = f"{10 * task.round + len(site)}:{site[0].encode().hex():0>64}"
        declared = Declared(steps=3, version="0.1.0", units=PATIENTS[site], epsilon=1.25 * task.round, ledger=head)
        return dataclasses.replace(super().update(site, task), declared=declared)


def test_declared_patients_weigh_where_patients_are_the_unit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)
    run_rounds(run, PrivateSites(run), ignore)
    assert {site: v["weight"] for site, v in run.record(1)["sites"].items()} == {"lyon": 0.2, "oslo": 0.3, "wien": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": 0.5}, r"declares figures that \[privacy\] unit = 'patient' withholds"),
        ({"images": 0}, r"declares figures that \[privacy\] unit = 'patient' withholds"),
        ({"units": 61}, r"declares 61 units, \[membership\] units says 60; agree"),
        ({"units": None}, r"declares None units, \[membership\] units says 60; agree"),
        ({"epsilon": None}, "does not declare its epsilon"),
        ({"steps": 0}, "declares None images and 0 steps"),
    ],
)
def test_a_private_update_that_declares_something_else_is_not_folded_but_its_ledger_is_noted(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    run = make_run(tmp_path / "run", **PATIENT)
    seen: list[str] = []

    class Wrong(PrivateSites):
        def update(self, site: str, task: Task) -> Update:
            seen.append(f"{task.round} {site} {task.ledger[:2]}")
            update = super().update(site, task)
            declared = dataclasses.replace(update.declared, **change)
            return dataclasses.replace(update, declared=declared) if site == "oslo" else update

    run_rounds(run, Wrong(run), ignore)
    assert re.search(words, run.record(1)["refused"]["oslo"])
    assert run.record(1)["ledgers"]["oslo"].startswith("14:")
    assert set(seen) == {"1 lyon ", "1 oslo ", "1 wien ", "2 lyon 14", "2 oslo 14", "2 wien 14"}


def test_the_newest_ledger_of_a_site_that_is_silent_is_carried_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)

    class OneFallsSilent(PrivateSites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            silent = site == "oslo" and task.round == 2
            return Refusal("silent", "sent nothing") if silent else super().answer(site, task)

    run_rounds(run, OneFallsSilent(run), ignore)
    heads = {site: head.split(":")[0] for site, head in run.record(2)["ledgers"].items()}
    assert heads == {"lyon": "24", "oslo": "14", "wien": "24"}


def test_a_ledger_that_became_shorter_does_not_hide_the_longer_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)

    class Restored(PrivateSites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            declared = dataclasses.replace(update.declared, ledger="9:" + "b" * 64)
            return dataclasses.replace(update, declared=declared) if task.round == 2 else update

    run_rounds(run, Restored(run), ignore)
    assert {head.split(":")[0] for head in run.record(2)["ledgers"].values()} == {"14"}


def test_the_round_goes_on_without_a_site_whose_budget_is_spent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **{**PATIENT, "membership": {"units": PATIENTS}})  # all are needed

    class OneIsExhausted(PrivateSites):
        code = "budget"

        def answer(self, site: str, task: Task) -> bytes | Refusal:
            return Refusal(self.code, "nothing is left") if site == "oslo" else super().answer(site, task)

    run_rounds(run, OneIsExhausted(run), ignore)
    assert run.record(2)["sites"].keys() == {"lyon", "wien"}
    assert run.record(2)["refused"] == {"oslo": "budget: nothing is left"}
    other = make_run(tmp_path / "other", **{**PATIENT, "membership": {"units": PATIENTS}})
    failing = OneIsExhausted(other)
    failing.code = "failed"
    with pytest.raises(UpdateError, match="2 of 3 sites gave an update, 3 are needed"):
        run_rounds(other, failing, ignore)


@pytest.mark.parametrize("least", [None, 2])
def test_nobody_with_budget_left_or_fewer_than_min_sites_stops_the_round(tmp_path: Path, least: int | None) -> None:
    membership = {"units": PATIENTS} | ({"min_sites": least} if least else {})
    run = make_run(tmp_path / "run", **{**PATIENT, "membership": membership})

    class Exhausted(PrivateSites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            spent = least is None or site != "lyon"
            return Refusal("budget", "nothing is left") if spent else super().answer(site, task)

    with pytest.raises(UpdateError, match=f"{least or 1} are needed"):
        run_rounds(run, Exhausted(run), ignore)


def test_a_ledger_that_came_with_a_refused_update_survives_a_cut_before_folding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", **PATIENT)

    class Diverged(PrivateSites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            if site == "oslo":
                next(iter(update.delta.values())).flat[0] = np.nan
            return update

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "fold", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            run_rounds(run, Diverged(run), ignore)
    run_rounds(open_run(tmp_path / "run"), PrivateSites(run), ignore)
    assert run.record(1)["ledgers"]["oslo"].startswith("14:")
    assert "oslo" not in run.record(1)["sites"]


def test_patients_that_nobody_declared_stop_the_round_before_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)
    short = run.config.model_copy(
        update={"membership": run.config.membership.model_copy(update={"units": {"lyon": 1}})}
    )
    sites = PrivateSites(run)
    with pytest.raises(ConfigError, match=r"\[membership\] units: no declared number of patients for 'oslo'"):
        run_rounds(dataclasses.replace(run, config=short), sites, ignore)
    assert sites.asked == []


def test_a_figure_that_nothing_withholds_must_be_declared(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", membership={"min_sites": 2})

    class Shy(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            declared = dataclasses.replace(update.declared, loss=None)
            return dataclasses.replace(update, declared=declared) if site == "oslo" else update

    run_rounds(run, Shy(run), ignore)
    assert "does not declare 'loss', which nothing withholds here" in run.record(1)["refused"]["oslo"]


def test_withheld_figures_are_shown_as_withheld_and_never_as_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)
    run_rounds(run, PrivateSites(run), ignore)
    record = run.record(2)
    numbers = tracking.metrics(record)
    assert numbers["oslo/epsilon"] == 2.5 and numbers["oslo/units"] == 60
    assert not [name for name in numbers if name.endswith(("loss", "images", "effective_rank"))]
    assert "round 2 of 2: loss withheld, 3 sites" in tracking.round_line(run, 2)
    assert tracking.collapse_lines(record["sites"]) == []
    cells = [list(column.cells) for column in rounds_table([record]).columns]
    assert cells[:3] == [["1"], ["2.500"], ["3"]]
    tracking.Tracking(run).draw(2)
    assert (run.path / "losses.png").stat().st_size > 1000


def test_a_release_says_what_each_site_spent_and_through_which_round(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **PATIENT)

    class OneFallsSilent(PrivateSites):
        def answer(self, site: str, task: Task) -> bytes | Refusal:
            silent = site == "oslo" and task.round == 2
            return Refusal("silent", "sent nothing") if silent else super().answer(site, task)

    run_rounds(run, OneFallsSilent(run), ignore)
    promised = json.loads((export(run) / "provenance.json").read_text())["differential_privacy"]
    assert promised["unit"] == "patient" and promised["delta"] == 1e-3
    assert promised["adjacency"] == "add or remove one patient"
    assert promised["epsilon"] == {"lyon": 2.5, "oslo": 1.25, "wien": 2.5}
    assert promised["statement"]["oslo"] == (
        "Everything site 'oslo' releases through round 1 is (1.250, 0.001)-differentially private under adding or "
        "removing one patient at 'oslo', against the server and the other sites. Timing, availability and the choice "
        "of hyper-parameters are outside it."
    )
    bare = make_run(tmp_path / "bare")
    run_rounds(bare, Sites(bare), ignore)
    assert guarantee(bare) == "none"
