"""The evidence: how patients are dealt to sites, and what the tables conclude from the cells."""

import argparse
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import utility
from conftest import ROOT, write_labelled
from partitions import LEAST, deal
from utility_table import Question, Scored, draw, markdown, questions

from wardround.probe.evaluation import Evaluation, Row
from wardround.probe.scores import Scores
from wardround.server.run_folder import open_run


@pytest.mark.parametrize("alpha", [None, 0.1])
def test_patients_stay_whole_and_the_first_site_is_the_largest(alpha: float | None) -> None:
    patients = np.repeat([f"p{number}" for number in range(200)], 20)
    labels = np.array(["sick", "well"])[(np.arange(4000) // 20 % 2)]
    places = deal(labels, patients, alpha, np.random.default_rng(0))
    for patient in np.unique(patients):
        assert len(set(places[patients == patient])) == 1
    names, sizes = np.unique(places, return_counts=True)
    assert list(names) == ["site1", "site2", "site3", "site4", "site5"]
    assert list(sizes) == sorted(sizes, reverse=True) and sizes.min() >= LEAST


def test_label_skew_puts_a_class_at_few_sites() -> None:
    patients = np.repeat([f"p{number}" for number in range(200)], 20)
    labels = np.array(["sick", "well"])[(np.arange(4000) // 20 % 2)]
    skewed = deal(labels, patients, 0.1, np.random.default_rng(0))
    largest = [max(np.mean(skewed[labels == one] == site) for site in set(skewed)) for one in ("sick", "well")]
    assert min(largest) > 0.5  # a fifth where they are dealt at random


def scored(arm: str, seed: int, linear: float, **tuned: float) -> Scored:
    """Return a cell of one linear probe, and of fine-tuning at 1 % where it is given."""
    rows = [("linear", 1.0, linear), *((probe, 0.01, auc) for probe, auc in tuned.items())]
    made = [
        Row(arm, probe, fraction, 1.0, 1, Scores(auc, auc, auc), None, None, None, (), 0.0, None)
        for probe, fraction, auc in rows
    ]
    found = Evaluation(tuple(made), (), (), (), (), (), {}, {}, (), 0, "", None, {})
    return Scored("mae", "skew", arm, seed, found)


def cells() -> dict[str, dict[int, Scored]]:
    """Return two seeds of a federation that keeps half and then all of what central training gains."""
    table = {
        "random": [scored("random", 1, 0.5, scratch=0.5), scored("random", 2, 0.5, scratch=0.6)],
        "central": [scored("central", 1, 0.9), scored("central", 2, 0.7)],
        "federated": [scored("federated", 1, 0.7, full=0.6), scored("federated", 2, 0.7, full=0.6)],
        "site1 alone": [scored("site1 alone", 1, 0.65), scored("site1 alone", 2, 0.75)],
        "site2 alone": [scored("site2 alone", 1, 0.55), scored("site2 alone", 2, 0.65)],
        "site1 in the same time": [scored("site1 in the same time", 1, 0.5)],
    }
    return {arm: {one.seed: one for one in found} for arm, found in table.items()}


def test_what_is_asked_of_a_federation_is_paired_by_seed() -> None:
    found = {one.text: one for one in questions(cells(), "skew")}
    kept = found["gain retained: (federated - random) / (central - random)"]
    assert kept.values == pytest.approx([0.5, 1.0]) and "**missed** by 0.050" in kept.answer
    joined = found["gain of joining: federated less the mean of 2 sites alone"]
    assert joined.values == pytest.approx([0.1, 0.0]) and "(goal +.030: met)" in joined.answer
    largest = found["federated less the largest site alone (site1)"]
    assert largest.values == pytest.approx([0.05, -0.05])
    briefly = found["federated less the largest site in the same time (site1)"]
    assert briefly.values == pytest.approx([0.2]) and briefly.least is None  # told, no goal
    tuned = found["fine-tuned at 1% of labels: federated less from scratch"]
    assert tuned.values == pytest.approx([0.1, 0.0])
    assert "int8 less federated" not in found  # an arm that was not trained is not told of


def test_where_central_gains_nothing_the_share_kept_is_not_made_up() -> None:
    table = cells() | {"central": {1: scored("central", 1, 0.5), 2: scored("central", 2, 0.4)}}
    (kept,) = (one for one in questions(table, "skew") if one.text.startswith("gain retained"))
    assert kept.values == [] and kept.answer == "2 seeds where central gains nothing"


def test_among_sites_dealt_at_random_central_is_the_bound() -> None:
    asked = {one.text: one for one in questions(cells(), "iid")}
    assert asked["federated less central"].least == -0.01
    assert not any(text.startswith("gain retained") for text in asked)


def test_the_page_has_a_line_an_arm_and_the_goals() -> None:
    machine = {"cores": "2", "cpu": "CPU", "torch": "2"}
    page = markdown(
        [one for found in cells().values() for one in found.values()],
        {"machine": machine, "command": "utility.py", "day": "2026-11-28"},
    )
    assert "| arm | linear 100% | fine-tuned 1% |" in page  # what no arm has is no column
    assert "| federated | .700 ± .000 |" in page
    assert "- federated less the largest site alone (site1): +.000 ± .635 (goal +.000: met)" in page


def test_an_answer_tells_by_how_much_a_goal_is_missed() -> None:
    assert Question("a", [0.01], least=0.05).answer == "+.010 (goal +.050: **missed** by 0.040)"


def test_a_server_optimiser_is_the_federations_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central training and a site by itself have no several sites' steps to carry on."""
    monkeypatch.chdir(ROOT)
    write_labelled(tmp_path, {"oslo": 20, "lyon": 40}, size=48)
    base = tomllib.loads(Path("federation_configs/malaria_simclr.toml").read_text())
    base["aggregation"] = {"momentum": 0.5}
    found = {arm: config for arm, config, _ in utility.arms(base, tmp_path, tmp_path, quick=False)}
    with_momentum = {arm for arm, config in found.items() if config.aggregation.momentum == 0.5}
    assert {"federated", "int8", utility.MISSING} <= with_momentum
    assert not {"central", "lyon alone", "lyon in the same time"} & with_momentum
    steps = {arm: config.training.total_steps for arm, config in found.items()}
    assert steps["lyon alone"] == steps["central"] == 2 * steps["lyon in the same time"] == 2 * steps["federated"]


@pytest.mark.parametrize(("method", "own"), [("simclr", set()), ("moco", {"FedEMA"}), ("mae", {"patient-level DP"})])
def test_each_method_has_the_arms_that_it_admits(
    method: str, own: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write_labelled(tmp_path, {"oslo": 20, "lyon": 40}, size=48)
    base = tomllib.loads(Path(f"federation_configs/malaria_{method}.toml").read_text())
    found = {arm for arm, _, _ in utility.arms(base, tmp_path, tmp_path, quick=False)}
    assert found & {"FedEMA", "patient-level DP"} == own and {"federated", "FedProx", "FedAdam"} <= found


@pytest.mark.slow
def test_cells_are_trained_once_and_an_absent_site_is_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only training shows that each arm's config is one that the platform takes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(utility, "QUICK_TRAINING", {"rounds": 3, "local_steps": 1, "batch_size": 4, "warmup_steps": 0})
    write_labelled(tmp_path / "malaria_cells", {"oslo": 20, "lyon": 40}, size=48)
    given = argparse.Namespace(
        suite="malaria",
        data=tmp_path,
        out=tmp_path / "out",
        quick=True,
        seeds=1,
        methods=["simclr"],
        partitions=["sites"],
        arms=None,
        rounds=None,
        tune=[1.0],
        only_kept=False,
        device="cpu",
        jobs=2,
    )
    monkeypatch.setattr(utility, "TUNING", utility.Tuning(ways=("full",), epochs=1, least_steps=1))
    assert [cell.arm for cell in utility.plan(given)][-2:] == ["lyon alone", "lyon in the same time"]
    given.arms = ["random", utility.MISSING]
    longer = utility.plan(argparse.Namespace(**(vars(given) | {"rounds": 7})))
    assert {cell.config.training.rounds for cell in longer} == {7}
    found = []
    for cell in utility.plan(given):
        folder = utility.folder_of(cell, given)
        found.append(Scored(cell.method, cell.partition, cell.arm, cell.seed, utility.score(cell, folder, given)))
        if cell.arm == utility.MISSING:
            refused = [open_run(folder / "run").record(number)["refused"] for number in (1, 2, 3)]
            missed = utility.rounds_away(cell.seed, 3)
            assert [sorted(one) for one in refused] == [["lyon"] if n in missed else [] for n in (1, 2, 3)]
            assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"release"}  # a disk is soon full
            shutil.rmtree(folder / "run")
        assert utility.score(cell, folder, given) == found[-1].found  # kept, without the run that it was
    tuned = {one.arm for one in found if one.auc("full", 1.0) is not None}
    assert tuned == {"random"}
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_missing_site_misses_a_third_of_the_rounds() -> None:
    away = utility.rounds_away(seed=1, rounds=10)
    assert len(away) == 3 and away <= set(range(1, 11)) and away == utility.rounds_away(seed=1, rounds=10)
