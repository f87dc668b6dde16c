"""A whole federation with privacy units at its sites, in one process: what is spent, withheld and refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import begun, tiny, write_labelled

from wardround.client import local_round as rounds
from wardround.client.charge import Charged, ledger_of
from wardround.client.local_round import local_round
from wardround.config import FederationConfig, read_site
from wardround.data import open_site
from wardround.errors import ConfigError, UpdateError
from wardround.plan import budgets, resolve
from wardround.privacy.accounting import Mechanism, epsilon
from wardround.simulate import simulate
from wardround.ssl.devices import Machine

UNITS = {"lyon": 8, "oslo": 12}


def private(**more: Any) -> FederationConfig:
    privacy = {"unit": "patient", "epsilon": 8.0, "delta": 1e-3, **more.pop("privacy", {})}
    return tiny(privacy=privacy, membership={"units": UNITS}, **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"), {"lyon": 30, "oslo": 40})


def test_each_site_spends_what_the_check_said_and_tells_no_more_than_it_may(
    data: Path, store: str, tmp_path: Path
) -> None:
    config = private()
    run = simulate(config, data, tmp_path / "run", store)
    said = budgets(config)
    for number in (1, 2):
        for site, declared in run.record(number)["sites"].items():
            assert declared["epsilon"] == pytest.approx(dict(said[site].curve)[number], rel=1e-3)
            assert declared["units"] == UNITS[site]
            measured = ("images", "patients", "loss", "loss_first", "seconds", "effective_rank", "alignment")
            assert [declared[name] for name in measured] == [None] * len(measured)
    ledger = ledger_of(read_site(tmp_path / "run/sites/lyon/site.toml"))
    assert epsilon(ledger.mechanisms(), 1e-3) <= 8.0
    assert [row.intent.round for row in ledger.rows()] == [1, 2]
    provenance = json.loads((run.path / "release/provenance.json").read_text())
    assert "one patient" in json.dumps(provenance)


def test_two_private_runs_of_one_seed_differ(data: Path, store: str, tmp_path: Path) -> None:
    runs = [simulate(private(), data, tmp_path / n, store) for n in ("a", "b")]
    first, second = (run.checkpoint(1).state for run in runs)
    assert all(not np.array_equal(first[name], second[name]) for name in first)


def test_an_exhausted_site_is_left_out_and_the_others_go_on(data: Path, store: str, tmp_path: Path) -> None:
    config = private()
    out = tmp_path / "run"
    original = rounds.local_round

    def lower_the_ceiling(*args: Any, **more: Any) -> Any:
        path = out / "sites/lyon/site.toml"
        path.write_text(path.read_text().replace("epsilon = 16.0", "epsilon = 6.5"))
        return original(*args, **more)

    from wardround.client import app

    app.local_round = lower_the_ceiling  # as a hospital would, by hand, between two rounds
    try:
        run = simulate(config, data, out, store)
    finally:
        app.local_round = original
    record = run.record(2)
    assert list(record["sites"]) == ["oslo"]
    assert record["refused"]["lyon"].startswith("budget: ")
    assert "6.5" not in record["refused"]["lyon"], "what a site allows is its own affair"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "simclr"}}, "NT-Xent compares .* negatives = 'public'"),
        ({"method": {"name": "moco"}}, "unit = 'site'"),
        ({"method": {"name": "vicreg"}}, "unit = 'site'"),
        ({"method": {"name": "dino", "centre": "batch"}}, "DINO's running centre"),
        (
            {"method": {"name": "byol"}, "backbone": {"name": "resnet18", "norm": "batch"}, "data": {"image_size": 32}},
            "batch normalisation shares statistics",
        ),
    ],
)
def test_what_couples_patients_is_refused_before_anything_runs(changes: dict[str, Any], words: str) -> None:
    config = private(**changes, evaluation_set={"kind": "procedural", "count": 8})
    with pytest.raises(ConfigError, match=words):
        resolve(config)


def test_privacy_without_declared_units_is_refused() -> None:
    config = tiny(privacy={"unit": "patient", "epsilon": 8.0, "delta": 1e-3})
    with pytest.raises(ConfigError, match=r"\[membership\] units"):
        resolve(config)


def test_a_diverged_private_round_ends_and_its_update_is_finite_or_refused_without_its_reason(
    data: Path, store: str, tmp_path: Path
) -> None:
    config = private(training={"learning_rate": 10.0, "precision": "bfloat16"})
    try:  # the noise is drawn anew each time, and decides which
        run = simulate(config, data, tmp_path / "run", store)
    except UpdateError as error:
        reasons = [f"'{site}' failed: the reason stands in the site's own log" for site in ("lyon", "oslo")]
        assert "; ".join(reasons) in str(error)
    else:
        assert all(np.isfinite(array).all() for array in run.checkpoint(2).state.values())


def test_several_processes_add_the_noise_once(data: Path, store: str, tmp_path: Path) -> None:
    config = private(training={"learning_rate": 1e-3, "local_steps": 1})
    plan = resolve(config)
    run = simulate(config, data, tmp_path / "run", store)
    site = read_site(tmp_path / "run/sites/oslo/site.toml")
    images = open_site(site, config.data)
    loud = Charged(Mechanism(rate=0.3, noise=50.0, steps=1), 12, 1.0, "1:" + "0" * 64)
    state = run.checkpoint(0).state
    sizes = []
    for devices in (1, 2):
        _, memory = local_round(plan.protocol, "oslo", 1, begun(state), {}, images, Machine(devices=devices), loud)
        # AdamW's first moment after one step is a tenth (or less) of the gradient: noise of sd sigma * C / batch.
        moment = np.concatenate([a.ravel() for n, a in memory.items() if n.startswith("exp_avg.")])
        sizes.append(float(moment.std()) / (1 - config.training.betas[0]))
    assert sizes == pytest.approx([50.0 / 4] * 2, rel=0.02)


def test_computing_activations_twice_is_refused(data: Path, store: str, tmp_path: Path) -> None:
    config = private()
    run = simulate(config, data, tmp_path / "run", store)
    site = read_site(tmp_path / "run/sites/oslo/site.toml")
    charged = Charged(Mechanism(0.3, 1.0, 3), 12, 1.0, "1:" + "0" * 64)
    images = open_site(site, config.data)
    machine = Machine(checkpointing=True)
    with pytest.raises((ConfigError, UpdateError), match="remove checkpointing"):
        local_round(resolve(config).protocol, "oslo", 1, begun(run.checkpoint(0).state), {}, images, machine, charged)
