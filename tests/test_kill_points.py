"""A federation killed at every boundary of what it writes down: started again, it ends with the same bits.

Each point is a real SIGKILL, before or after the n-th call of one function, in a process of its own.
"""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, merged, to_toml, write_labelled
from warm import program

from wardround.server.run_folder import open_run
from wardround.update import state_hash

pytestmark = pytest.mark.slow

POINTS = [  # where, which function, before or after it, at which call
    ("server", "wardround.server.spool:Spool.open", "before", 1),
    ("server", "wardround.server.spool:Spool.open", "after", 2),
    ("server", "wardround.server.spool:Spool.add", "before", 2),
    ("server", "wardround.server.spool:Spool.add", "after", 3),
    ("server", "wardround.server.spool:Spool.close", "before", 1),
    ("server", "wardround.server.spool:Spool.close", "after", 2),
    ("server", "wardround.server.rounds:next_state", "before", 1),
    ("server", "wardround.server.rounds:next_state", "after", 2),
    ("server", "wardround.registry.tensors:TensorWriter.put", "before", 2),  # the middle of the first state
    ("server", "wardround.registry.checkpoint:write", "before", 2),
    ("server", "wardround.registry.tensors:TensorWriter.__exit__", "after", 3),  # the middle of a checkpoint
    ("server", "wardround.registry.checkpoint:write", "after", 2),
    ("server", "wardround.server.spool:Spool.drop_updates", "before", 1),
    ("server", "wardround.registry.mlflow_store:Store.open_run", "after", 1),
    ("server", "wardround.registry.mlflow_store:Store.log_round", "before", 2),
    ("server", "wardround.registry.mlflow_store:Store.log_round", "after", 1),
    ("server", "wardround.registry.mlflow_store:Store.register", "before", 1),
    ("server", "wardround.registry.mlflow_store:Store.register", "after", 1),
    ("site", "wardround.client.app:local_round", "before", 2),
    ("site", "wardround.ssl.engine:Plain.gradients", "after", 5),  # the middle of a training
    ("site", "wardround.client.midway:write", "after", 3),
    ("site", "wardround.client.journal:Journal.finish", "before", 2),
    ("site", "wardround.client.journal:Journal.finish", "after", 3),
    ("site", "wardround.client.journal:Journal.replay", "after", 2),
]
STEPS = [  # where states cross as steps: one site, whose process has the state in memory
    ("site", "wardround.client.journal:Journal.hold", "before", 2),
    ("site", "wardround.client.journal:Journal.hold", "after", 2),
    ("site", "wardround.client.journal:Journal.finish", "before", 2),
    ("server", "wardround.server.rounds:next_state", "after", 2),
]
# The first child of a point is killed, the second goes on; one process imports torch for all of them.
WALK = """
import importlib, json, os, signal, sys
from pathlib import Path
import wardround.ssl.pretrain
from wardround.config import FederationConfig, read_toml
from wardround.simulate import simulate
from wardround.update import state_hash

config, data, out, store, points = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
wardround.ssl.pretrain.KEEP_SECONDS = 0.0

def killing(function, when, calls):
    seen = []
    def wrapped(*arguments, **more):
        seen.append(1)
        if when == "before" and len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **more)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def child(folder, point):
    if point:
        _, where, when, calls = point
        module, _, name = where.partition(":")
        owner = importlib.import_module(module)
        *classes, name = name.split(".")
        for one in classes:
            owner = getattr(owner, one)
        setattr(owner, name, killing(getattr(owner, name), when, calls))
    run = simulate(read_toml(config, FederationConfig), data, folder, store, threads=1)
    last = run.committed()
    (folder / "result.json").write_text(json.dumps([last, state_hash(run.checkpoint(last[-1]).state)]))

def forked(folder, point):
    number = os.fork()
    if number == 0:
        try:
            child(folder, point)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

found = {}
for number, point in enumerate(json.loads(points)):
    folder = out / str(number)
    found[str(number)] = [forked(folder, point), forked(folder, None)]
(out / "found.json").write_text(json.dumps(found))
"""


def walk(folder: Path, sites: dict[str, int], changes: dict[str, Any], points: list[tuple[str, str, str, int]]) -> Path:
    """Return the folder of all runs: `whole`, which nobody killed, and one a point."""
    (folder / "tiny.toml").write_text(to_toml(merged(TINY, changes)))
    data, store = write_labelled(folder / "data", sites), f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "runs").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # By a process of its own: a database that is open must not be forked.
    whole = ["simulate", folder / "tiny.toml", "--data", data, "--out", folder / "runs/whole", "--tracking", store]
    command = [str(program() / "wardround"), *map(str, whole), "--threads", "1"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    arguments = [folder / "tiny.toml", data, folder / "runs", store, json.dumps(points)]
    done = subprocess.run(
        [program() / "python", "-c", WALK, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder / "runs"


def assert_the_same_bits(runs: Path, number: int) -> None:
    """Check that a run was killed, and ended as the one that nobody killed."""
    killed, finished = json.loads((runs / "found.json").read_text())[str(number)]
    assert killed == -signal.SIGKILL, "the point was never reached"
    assert finished == 0
    rounds, state = json.loads((runs / str(number) / "result.json").read_text())
    assert rounds == [0, 1, 2]
    assert state == state_hash(open_run(runs / "whole").checkpoint(2).state)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"training": {"optimiser_state": "kept"}, "evaluation_set": {"kind": "procedural", "count": 8}}
    return walk(tmp_path_factory.mktemp("walk"), {"lyon": 20, "oslo": 30}, changes, POINTS)


@pytest.fixture(scope="module")
def walked_by_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return walk(tmp_path_factory.mktemp("steps"), {"lyon": 20}, {"encoding": "int8"}, STEPS)


@pytest.mark.parametrize("number", range(len(POINTS)), ids=[" ".join(map(str, point[1:])) for point in POINTS])
def test_killed_there_it_is_started_again_and_ends_with_the_same_bits(walked: Path, number: int) -> None:
    assert_the_same_bits(walked, number)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[" ".join(map(str, point[1:])) for point in STEPS])
def test_killed_while_a_site_holds_a_state_as_steps_it_ends_with_the_same_bits(
    walked_by_steps: Path, number: int
) -> None:
    assert_the_same_bits(walked_by_steps, number)
    assert list((walked_by_steps / "whole").rglob("journal/*/step-*.safetensors")), "no step was kept"
