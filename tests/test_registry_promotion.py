"""The gate to @champion, condition by condition, and the way back; over a real SQLite MLflow."""

import itertools
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from released import KEY, OTHER, OTHER_PIN, PIN, linear, write_release
from rich.console import Console

from wardround.errors import CheckpointError, ConfigError, ReleaseRefusal, TrackingError
from wardround.registry.mlflow_store import Store
from wardround.registry.promotion import Examined, champions, promote, rollback
from wardround.report.releases import gate_table, models_table

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
NUMBERS = itertools.count()
SPENT = {"unit": "patient", "adjacency": "add or remove one patient", "delta": 1e-5, "epsilon": {"lyon": 2.5}}


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store") / "mlflow.db"))


class Name:
    """A registered name of a test's own."""

    def __init__(self, store: Store, name: str, home: Path) -> None:
        self.store, self.name, self.home = store, name, home
        self.shown: list[Examined] = []

    def register(self, seed: int, key: Any = KEY, **changes: Any) -> str:
        folder = write_release(self.home / str(len(list(self.home.iterdir()))), self.name, seed, key, **changes)
        return self.store.register(folder, self.name, "candidate", None, {"round": "1"}, {})

    def promote(self, version: str = "candidate", trust: str | None = None) -> Examined:
        reference = f"{self.name}{'@' if version == 'candidate' else '/'}{version}"
        return promote(self.store, reference, "Ada", "it is better", trust, self.shown.append)

    def rollback(self) -> tuple[str, str]:
        return rollback(self.store, self.name, "Bob", "it was not", None)

    @property
    def champion(self) -> str | None:
        return next((row.version for row in self.store.models(self.name) if "champion" in row.aliases), None)

    def failed(self) -> list[str]:
        return [one.what for one in self.shown[-1].conditions if not one.met]


@pytest.fixture
def name(mlflow: Store, tmp_path: Path) -> Name:
    return Name(mlflow, f"lungs-{next(NUMBERS)}", tmp_path)


def test_the_first_champion_is_one_that_was_measured_and_who_when_why_is_kept(name: Name) -> None:
    name.register(1)
    examined = name.promote()
    assert name.champion == examined.version == "1"
    assert [one.what for one in examined.conditions] == ["files", "signature", "probe", "features", "epsilon"]
    (row,) = name.store.models(name.name)
    record = json.loads(row.tags["champion.0001"])
    assert (record["by"], record["why"], record["was"]) == ("Ada", "it is better", None)
    assert record["when"].endswith("+00:00")
    assert row.tags["signed_by"] == PIN


# Each is the candidate's change against a champion of 0.8, and the condition that stops it.
STOPS: dict[str, tuple[dict[str, Any], str]] = {
    "worse by more than the tolerance": (linear(0.78), "probe"),
    "measured on another set": (linear(0.99, over="6" * 64), "probe"),
    "not measured": ({"evaluation": {"missing": "no set"}}, "probe"),
    "collapsed": ({"features": {"effective_rank": 1.2, "feature_spread": 0.8}}, "features"),
    "collapse not measured": ({"features": {"missing": "no images"}}, "features"),
    "above the ceiling": ({"differential_privacy": SPENT, "gate": {"epsilon": 2.4}}, "epsilon"),
    "no privacy under a ceiling": ({"gate": {"epsilon": 8.0}}, "epsilon"),
    "another signer": ({"key": OTHER}, "signature"),
    "no signer": ({"key": None}, "signature"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_what_fails_one_condition_is_refused_and_changes_nothing(name: Name, stop: str) -> None:
    changes, condition = STOPS[stop]
    name.register(1)
    name.promote()
    name.register(2, **changes)
    before = name.store.models(name.name)
    with pytest.raises(ReleaseRefusal, match=rf"/2': is not promoted, its {condition} not being as expected; nothing"):
        name.promote()
    assert name.failed() == [condition]
    assert name.store.models(name.name) == before and name.champion == "1"


def test_a_candidate_as_good_within_the_tolerance_becomes_champion(name: Name) -> None:
    name.register(1)
    name.promote()
    name.register(2, **linear(0.795), differential_privacy=SPENT, gate={"epsilon": 2.5})
    assert name.promote().champion == "1"
    assert name.champion == "2"


def test_the_first_is_refused_too_where_it_was_never_measured_or_signed(name: Name) -> None:
    name.register(1, key=None, evaluation={"missing": "no set", "probes": {}})
    with pytest.raises(ReleaseRefusal, match="its signature and probe not being as expected"):
        name.promote()
    assert name.champion is None


def test_the_champions_own_weights_measured_on_a_new_set_take_its_place(name: Name) -> None:
    """Else no set could ever be replaced."""
    name.register(1)
    name.promote()
    name.register(1, **linear(0.3, over="7" * 64))
    name.promote()
    name.register(2, **linear(0.31, over="7" * 64))
    name.promote()
    assert name.champion == "3"


def test_a_pinned_key_may_follow_another_and_a_pin_that_does_not_fit_refuses(name: Name) -> None:
    name.register(1)
    name.promote(trust=PIN)
    name.register(2, key=OTHER)
    with pytest.raises(CheckpointError, match="is signed by"):
        name.promote(trust=PIN)
    name.promote(trust=OTHER_PIN)
    assert name.champion == "2"


def test_rollback_walks_back_the_chain_of_champions_and_is_recorded(name: Name) -> None:
    for seed in (1, 2, 3):
        name.register(seed)
        name.promote()
    assert champions(name.store.models(name.name), "3") == ["1", "2", "3"]
    assert name.rollback() == ("2", "3")
    name.register(4)
    name.promote()
    assert champions(name.store.models(name.name), "4") == ["1", "2", "4"]
    assert [name.rollback(), name.rollback()] == [("2", "4"), ("1", "2")]
    with pytest.raises(ConfigError, match="version 1 is the first champion; there is none to go back to"):
        name.rollback()
    row = next(row for row in name.store.models(name.name) if row.version == "2")
    record = json.loads(row.tags["champion.0004"])
    assert (record["by"], record["why"], record["was"], record["by_way_of"]) == ("Bob", "it was not", "3", "rollback")
    name.promote("3")
    assert name.rollback() == ("1", "3")


def test_a_kill_between_the_record_and_the_alias_leaves_the_champion_of_before(
    name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    name.register(1)
    name.promote()
    name.register(2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        name.promote()
    assert name.champion == "1"
    name.promote()
    assert name.champion == "2"
    assert name.rollback() == ("1", "2")


def test_altered_weights_are_refused_before_the_gate_is_asked(name: Name) -> None:
    name.register(1)
    client = MlflowClient(name.store.uri, name.store.uri)
    location = client.get_model_version_download_uri(name.name, "1").removeprefix("file://")
    with (Path(location) / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' differs from the hash recorded with it"):
        name.promote()
    assert name.shown == [] and name.champion is None


def test_a_version_without_lineage_is_refused_with_what_to_do(name: Name) -> None:
    folder = write_release(name.home / "old", name.name, 1, key=None)
    (folder / "provenance.json").write_text(json.dumps({"round": 1}))
    name.store.register(folder, name.name, "candidate", None, {}, {})
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"has no lineage \('sites' is missing .* register its round with"):
        name.promote()
    assert name.champion is None


def test_a_lineage_of_another_make_is_one_line_and_no_trace(name: Name) -> None:
    name.register(1, features={"rank": 9.0})
    with pytest.raises(CheckpointError, match="its lineage is not as this Wardround writes it: 'effective_rank'"):
        name.promote()


@pytest.mark.parametrize(("by", "why"), [(" ", "x"), ("Ada", ""), ("Ada", "two\nlines"), ("Ada", "x" * 501)])
def test_who_and_why_are_lines_that_say_something(name: Name, by: str, why: str) -> None:
    name.register(1)
    with pytest.raises(ConfigError, match="expected a line of at most 500 letters"):
        promote(name.store, f"{name.name}/1", by, why, None, name.shown.append)
    assert name.champion is None and name.shown == []


def test_a_reference_that_names_nothing_is_answered_with_the_nearest(name: Name) -> None:
    name.register(1)
    with pytest.raises(ConfigError, match="has no alias 'candidat'; the nearest are: candidate"):
        promote(name.store, f"{name.name}@candidat", "Ada", "x", None, name.shown.append)
    with pytest.raises(ConfigError, match=f"there is no '{name.name}x'; the nearest are: lungs-"):
        rollback(name.store, f"{name.name}x", "Ada", "x", None)
    name.promote()
    with pytest.raises(ConfigError, match="is the champion already"):
        name.promote()


def test_a_registry_that_is_down_is_said_to_be() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        store = Store(f"http://127.0.0.1:{held.getsockname()[1]}")
        with pytest.raises(TrackingError, match=r"does not answer. Start it"):
            promote(store, "lungs@candidate", "Ada", "x", None, lambda _: None)
        with pytest.raises(TrackingError, match=r"does not answer. Start it"):
            rollback(store, "lungs", "Ada", "x", None)


def text(thing: Any, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(thing)
    return captured.get()


def test_the_table_of_the_gate_has_found_beside_expected_and_epsilon_rounded_up(name: Name) -> None:
    spent = {**SPENT, "epsilon": {"lyon": 2.50001, "oslo": 1.0}}
    name.register(1, differential_privacy=spent, gate={"epsilon": 2.5})
    with pytest.raises(ReleaseRefusal):
        name.promote()
    table = text(gate_table(name.shown[-1]))
    assert "lyon 2.501, oslo 1.000" in table
    assert "at most 2.5 at each site, add or remove one patient, delta 1e-05" in table
    assert "0.800 (random 0.600, raw pixels 0.500)" in table
    assert table.count("not met") == 1 and "there is no champion yet" in table


def test_the_table_of_models_has_aliases_floors_privacy_and_whether_it_is_signed(name: Name) -> None:
    folder = write_release(name.home / "r", name.name, 1)
    tags = {
        "round": "4",
        "probe": json.dumps({"backbone": 0.8, "random": 0.6, "raw pixels": 0.5}),
        "privacy": "epsilon 2.501, add or remove one patient, delta 1e-05",
    }
    name.store.register(folder, name.name, "candidate", None, tags, {})
    bare = write_release(name.home / "bare", name.name, 2, key=None)
    name.store.register(bare, name.name, "old", None, {}, {})
    lines = text(models_table(name.store.models(name.name))).splitlines()

    def row(alias: str) -> list[str]:
        (start,) = [number for number, line in enumerate(lines) if f" {alias} " in line]
        return lines[start : start + 3]

    first, below, last = row("candidate")
    assert "0.800" in first and "epsilon 2.501, add or remove one patient, delta 1e-05" in first
    assert below.split() == ["round", "4", "random", "0.600", "signed"] and last.split() == ["raw", "pixels", "0.500"]
    old, beside, *_ = row("old")
    assert "not measured" in old and "not said" in old and beside.split() == ["not", "signed"]
    narrow = text(models_table(name.store.models(name.name)), width=80).splitlines()
    assert all(any(word in line for line in narrow) for word in (f"{name.name}/1", "candidate", "raw pixels 0.500"))
    assert max(map(len, narrow)) <= 80
