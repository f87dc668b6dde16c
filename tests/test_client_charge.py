"""How a site charges a task, and what a person at the site sees of it."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny, to_toml
from warm import program

from wardround.client.charge import charge, ledger_of, opened, recover
from wardround.config import Protocol, SiteConfig, read_site
from wardround.config.site import CoordinatorConfig
from wardround.errors import BudgetExhausted, ConfigError, PolicyRefusal
from wardround.privacy.accounting import epsilon, rounds_left
from wardround.update import Declared, Task

# Without sampling (as many units as a batch has) epsilon has a closed form, and comes fast.
TERMS: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "units": 4}


def write_site(folder: Path, privacy: dict[str, Any] | None = None) -> Path:
    """Write a site.toml, by default with the terms above."""
    tree = {"format": 1, "name": "lyon", "work": "work", "images": {"folder": "images"}}
    folder.mkdir(exist_ok=True)
    (folder / "site.toml").write_text(to_toml({**tree, **({"privacy": privacy} if privacy else {})}))
    return folder / "site.toml"


def site(folder: Path, **changes: Any) -> SiteConfig:
    return read_site(write_site(folder, {key: value for key, value in {**TERMS, **changes}.items() if value}))


def protocol(**changes: Any) -> Protocol:
    privacy = {"unit": "patient", "epsilon": 4.0, "delta": 1e-6, "clip": 0.5}
    return tiny(**{"privacy": privacy, "training": {"rounds": 10}, **changes}).protocol("0" * 64)


def task(round: int = 1, seen: str = "") -> Task:
    return Task(round, "", 0, b"", seen)


def wardround(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [str(program() / "wardround"), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_without_terms_of_its_own_a_site_spends_no_privacy(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefusal, match=r"site.toml has no \[privacy\] section"):
        charge(read_site(write_site(tmp_path)), protocol(), task())
    with pytest.raises(PolicyRefusal, match="declare how many patients the site has"):
        charge(site(tmp_path, units=None), protocol(), task())
    with pytest.raises(PolicyRefusal, match=r"batch_size = 4: more than the 3 units .* lower batch_size"):
        charge(site(tmp_path, units=3), protocol(), task())
    assert not (tmp_path / "work").exists()


def test_units_that_the_federation_has_otherwise_cost_nothing(tmp_path: Path) -> None:
    own = site(tmp_path, units=40)
    with pytest.raises(PolicyRefusal, match=r"units = 40 in site.toml, and 50 in .* Nothing was spent"):
        charge(own, protocol(), replace(task(), units=50))
    assert not (tmp_path / "work").exists()
    charge(own, protocol(), replace(task(), units=40))


def test_a_charge_is_one_row_with_the_mechanism_to_train_with(tmp_path: Path) -> None:
    own, agreed = site(tmp_path, units=40), protocol()
    charged = charge(own, agreed, task(round=7))
    (row,) = ledger_of(own).rows()
    assert row.intent.mechanism == charged.mechanism
    assert (charged.mechanism.rate, charged.mechanism.steps, charged.units) == (4 / 40, 3, 40)
    assert (row.intent.federation, row.intent.protocol, row.intent.round) == ("tiny", agreed.digest(), 7)
    assert (row.intent.unit, row.intent.clip, row.delta) == ("patient", 0.5, 1e-5)
    assert charged.ledger == ledger_of(own).head()


def test_the_noise_spends_the_protocols_epsilon_over_all_its_rounds(tmp_path: Path) -> None:
    charged = charge(site(tmp_path), protocol(), task())
    assert 3.99 < epsilon([charged.mechanism.times(10)], 1e-6) <= 4.0


def test_a_rerun_is_charged_again_and_what_is_declared_says_so(tmp_path: Path) -> None:
    own = site(tmp_path)
    one, two = charge(own, protocol(), task()), charge(own, protocol(), task())
    assert len(ledger_of(own).rows()) == 2
    assert one.epsilon == epsilon([one.mechanism], 1e-6)  # at the federation's delta, not the site's
    assert two.epsilon == epsilon([one.mechanism.times(2)], 1e-6)
    declared = Declared(3, "0.1.0", units=two.units, epsilon=two.epsilon, ledger=two.ledger)
    assert declared.private


def test_a_federation_is_told_its_own_share_and_no_other(tmp_path: Path) -> None:
    own = site(tmp_path)
    alone = charge(own, protocol(), task()).epsilon
    other = charge(own, protocol(seed=4), task()).epsilon
    assert other == alone


def test_past_the_ceiling_over_all_federations_no_round_is_charged(tmp_path: Path) -> None:
    own = site(tmp_path, epsilon=2.0)
    a_round = charge(own, protocol(seed=4), task()).mechanism
    fits = rounds_left([a_round], a_round, 2.0, 1e-5)
    for number in range(fits):
        charge(own, protocol(), task(number + 1))
    with pytest.raises(BudgetExhausted, match="ceiling 2 is spent"):
        charge(own, protocol(), task(fits + 1))
    assert len(ledger_of(own).rows()) == 1 + fits


def test_a_ledger_put_back_stops_recovers_and_goes_on(tmp_path: Path) -> None:
    own = site(tmp_path)
    path = own.work / "ledger.db"
    seen = charge(own, protocol(), task(1)).ledger
    shutil.copy(path, tmp_path / "copy.db")
    for number in (2, 3):
        seen = charge(own, protocol(), task(number, seen)).ledger
    truth = epsilon(ledger_of(own).mechanisms(), 1e-5)
    shutil.copy(tmp_path / "copy.db", path)
    with pytest.raises(PolicyRefusal, match="ledger recover"):
        charge(own, protocol(), task(4, seen))
    shown = wardround("site", "ledger", tmp_path / "site.toml")
    assert "The coordinator of 'tiny' has seen 3 rows, and not these" in shown.stdout
    done = wardround("site", "ledger", "recover", tmp_path / "site.toml")
    assert done.returncode == 0, done.stderr
    assert "Row 4 charges 3 trainings of federation 'tiny'" in done.stdout and "saw 3 rows" in done.stdout
    assert epsilon(ledger_of(own).mechanisms(), 1e-5) >= truth
    assert charge(own, protocol(), task(4, seen)).ledger.startswith("5:")
    again = wardround("site", "ledger", "recover", tmp_path / "site.toml")
    assert "nothing is charged" in again.stdout


def test_two_federations_that_share_a_ledger_have_one_ceiling(tmp_path: Path) -> None:
    """A hospital has a kit and a work folder for each."""
    kits = [site(tmp_path / name, epsilon=2.0, ledger="../ledger.db") for name in ("one", "other")]
    a_round = charge(kits[0], protocol(seed=4), task()).mechanism
    fits = rounds_left([a_round], a_round, 2.0, 1e-5)
    for number in range(fits):
        charge(kits[1], protocol(), task(number + 1))
    for kit in kits:
        with pytest.raises(BudgetExhausted, match="ceiling 2 is spent"):
            charge(kit, protocol(seed=5), task())
    shown = wardround("site", "ledger", tmp_path / "one" / "site.toml")
    assert f"The chain of {1 + fits} rows is whole." in shown.stdout and not (tmp_path / "one" / "work").exists()


def test_a_head_that_the_sites_key_did_not_seal_stops_nothing_and_costs_nothing(tmp_path: Path) -> None:
    """Whoever names heads could else stop every private round here, and have the recovery charge what never was."""
    key = tmp_path / "site.key"
    key.write_text("the site's own")
    other = tmp_path / "public"
    known = CoordinatorConfig(address="c:1", ca_certificate=other, private_key=key, signing_key=other)
    own = site(tmp_path).model_copy(update={"coordinator": known})
    seen = charge(own, protocol(), task()).ledger
    assert Declared(3, "0.1.0", units=4, epsilon=1.0, ledger=seen).ledger == seen, "it may leave"
    assert seen.startswith(ledger_of(own).head()) and opened(own, seen) == ledger_of(own).head()
    for false in (f"999999999:{'0' * 64}", f"500:{'0' * 96}", f"2:{seen[2:]}", seen[:-1] + "x", ledger_of(own).head()):
        assert opened(own, false) == ""
        seen = charge(own, protocol(), task(2, false)).ledger
    assert ledger_of(own).gaps() == [] and recover(own) == []
    (own.work / "ledger.db").unlink()
    with pytest.raises(PolicyRefusal, match="ledger recover"):
        charge(own, protocol(), task(3, seen))
    (row,) = recover(own)
    assert row.count == 6
    key.write_text("a new one")  # after the old was lost: what the coordinator has seen is passed over, once
    assert charge(own, protocol(), task(4, seen)).ledger.startswith("8:")


def test_a_recovery_needs_the_sites_terms(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \[privacy\] section"):
        recover(read_site(write_site(tmp_path)))


def test_a_site_killed_right_after_the_charge_has_been_charged(tmp_path: Path) -> None:
    """Between the ledger's word and the first noised step nothing is given back, however the process ends."""
    code = """
import json, os, signal, sys
from pathlib import Path
from wardround.client.charge import charge
from wardround.config import Protocol, parse, read_site
from wardround.update import Task
charge(read_site(Path(sys.argv[1])), parse(json.loads(sys.argv[2]), Protocol, "test"), Task(1, "", 0, b""))
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = write_site(tmp_path, TERMS)
    command = [sys.executable, "-c", code, str(path), protocol().model_dump_json()]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert len(ledger_of(read_site(path)).rows()) == 1
    second = charge(read_site(path), protocol(), task())  # the round starts again
    assert second.epsilon == epsilon([second.mechanism.times(2)], 1e-6)
    assert second.ledger.startswith("2:")


def test_the_ledger_is_printed_with_what_is_spent_and_left(tmp_path: Path) -> None:
    own = site(tmp_path)
    assert "The ledger is empty." in wardround("site", "ledger", tmp_path / "site.toml").stdout
    for number in (1, 2):
        charged = charge(own, protocol(), task(number))
    done = wardround("site", "ledger", tmp_path / "site.toml")
    assert done.returncode == 0, done.stderr
    spent = ledger_of(own).mechanisms()
    left = rounds_left(spent, charged.mechanism, 8.0, 1e-5)
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    day, noise = ledger_of(own).rows()[0].time[:10], f"{charged.mechanism.noise:g}"
    assert table == [[str(n), day, "tiny", str(n), "1", noise, "3", "intent"] for n in (1, 2)]
    assert "The chain of 2 rows is whole." in done.stdout
    assert f"epsilon = {epsilon(spent, 1e-5):.1f}" in done.stdout and "add/remove one patient" in done.stdout
    assert f"Ceiling: epsilon = 8; {left} more rounds like the last one fit below it." in done.stdout


def test_a_broken_chain_is_one_line_and_exit_2(tmp_path: Path) -> None:
    own = site(tmp_path)
    charge(own, protocol(), task())
    db = sqlite3.connect(own.work / "ledger.db")
    db.execute("DROP TRIGGER no_update")
    db.execute("UPDATE ledger SET content = replace(content, '\"steps\":3', '\"steps\":1')")
    db.commit()
    db.close()
    done = wardround("site", "ledger", tmp_path / "site.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the ledger's chain is broken: row 1 was altered.")
    assert done.stderr.count("\n") == 1
