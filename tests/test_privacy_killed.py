"""A site killed at the worst moments of a private round: its ledger never says too little."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny, to_toml, write_labelled

from wardround.client.app import run_task
from wardround.client.charge import ledger_of
from wardround.config import SiteConfig, read_site
from wardround.errors import PolicyRefusal
from wardround.plan import Plan, resolve
from wardround.privacy.accounting import epsilon
from wardround.update import Task, Update, pack

MOMENTS = ("charged", "stepped", "trained", "finished")
# Each child takes the task of a site of its own and kills itself; one process imports torch for all of them.
KILLED = """
import os, signal, sys
from pathlib import Path
from wardround.client import app
from wardround.client.journal import Journal
from wardround.config import read_site
from wardround.privacy.engine import Private
from wardround.update import Task

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def run(folder):
    moment, finish, gradients = folder.name, Journal.finish, Private.gradients

    def counted(*arguments):
        loss = gradients(*arguments)
        with (folder / "steps").open("a") as file:
            file.write("step\\n")
        return loss if moment != "stepped" else die()

    Private.gradients = counted
    if moment == "charged":
        app.local_round = die
    if moment == "trained":
        Journal.finish = die
    if moment == "finished":
        Journal.finish = lambda *arguments: (finish(*arguments), die())
    state = (folder / "state").read_bytes()
    app.run_task(read_site(folder / "site.toml"), Task(1, (folder / "protocol.json").read_text(), 0, state))

for folder in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        run(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, folder
"""


@cache
def private_plan() -> Plan:
    privacy = {"unit": "patient", "epsilon": 4.0, "delta": 1e-4}
    training = {"rounds": 2, "local_steps": 3, "batch_size": 8}  # of 8 declared units: epsilon comes fast
    return resolve(tiny(privacy=privacy, training=training, membership={"units": {"lyon": 8}}))


def private_site(folder: Path, ceiling: float = 8.0) -> Task:
    """Write a site that approves a private protocol, and return the first round's task."""
    plan = private_plan()
    write_labelled(folder / "images", {"lyon": 30})
    site: dict[str, Any] = {"format": 1, "name": "lyon", "work": "work", "approved": [plan.digest], "threads": 1}
    site |= {"images": {"folder": "images", "site": "lyon"}, "device": "cpu"}
    site |= {"privacy": {"epsilon": ceiling, "delta": 1e-5, "units": 8}}
    (folder / "site.toml").write_text(to_toml(site))
    (folder / "protocol.json").write_text(plan.protocol.model_dump_json())
    (folder / "state").write_bytes(pack(plan.state, {}))
    return Task(1, plan.protocol.model_dump_json(), 0, pack(plan.state, {}))


def test_a_site_killed_between_charge_and_send_never_reports_too_little(tmp_path: Path) -> None:
    """Asked again it is charged again, unless the update was on disk: that is sent as it is, without a charge."""
    tasks = {moment: private_site(tmp_path / moment) for moment in MOMENTS}
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / moment) for moment in MOMENTS)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == 0, killed.stderr.decode()
    for moment, steps, rows_after in (("charged", 0, 2), ("stepped", 1, 2), ("trained", 3, 2), ("finished", 3, 1)):
        taken = tmp_path / moment / "steps"
        assert (taken.read_text().count("step") if taken.exists() else 0) == steps, moment
        after_the_kill(read_site(tmp_path / moment / "site.toml"), tasks[moment], rows_after)


def after_the_kill(site: SiteConfig, task: Task, rows_after: int) -> None:
    (row,) = ledger_of(site).rows()  # though no round has ended
    assert row.mechanism.steps == 3
    update = Update.from_bytes(run_task(site, task))
    spent = ledger_of(site).mechanisms()
    assert [each.steps for each in spent] == [3] * rows_after
    assert update.declared.private
    assert update.declared.epsilon == epsilon(spent, 1e-4)
    assert update.declared.ledger == ledger_of(site).head()
    assert run_task(site, task) == update.to_bytes() and len(ledger_of(site).rows()) == rows_after


def test_a_round_is_not_charged_for_ever_by_a_site_that_always_dies(tmp_path: Path) -> None:
    task = private_site(tmp_path, ceiling=1000.0)
    site = read_site(tmp_path / "site.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wardround.client.app.local_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(site.max_trainings_per_round):
            with pytest.raises(KeyboardInterrupt):
                run_task(site, task)
    with pytest.raises(PolicyRefusal, match="max_trainings_per_round = 2"):
        run_task(site, task)
    assert len(ledger_of(site).rows()) == 2
