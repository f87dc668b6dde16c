"""The newest state probed at the sites: on their own labels, with their word, and scores alone come back."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny, to_toml, write_labelled
from flwr.app import Message
from typer.testing import CliRunner

from wardround import simulate as simulation
from wardround.cli import cli
from wardround.client.audit import AuditLog
from wardround.data import read_labelled, select_site
from wardround.downstream.arms import release_arm
from wardround.downstream.evaluate import evaluate
from wardround.encoding import compress
from wardround.errors import ConfigError, UpdateError
from wardround.probe.site_scores import SiteScores
from wardround.registry.checkpoint import Checkpoint
from wardround.server import scoring
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.scoring import kept_at, read_asked
from wardround.simulate import InProcessGrid, ask_sites, simulate
from wardround.update import Refusal, pack, state_hash


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("asked")
    data = write_labelled(folder / "data", {"lyon": 60, "oslo": 40})
    config = tiny(training={"rounds": 1, "local_steps": 2, "batch_size": 4})
    return simulate(config, data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}", threads=1)


@pytest.fixture(autouse=True)
def unchanged(run: RunFolder) -> Iterator[None]:
    """Put back what a test changes of the sites."""
    files = {path: path.read_text() for path in run.path.glob("sites/*/site.toml")}
    yield
    for path, text in files.items():
        path.write_text(text)


def change(run: RunFolder, site: str, **evaluation: Any) -> None:
    """Change a site's [evaluation]; none takes the section out."""
    path = run.path / "sites" / site / "site.toml"
    found = tomllib.loads(path.read_text())
    found["evaluation"] = found.get("evaluation", {}) | evaluation
    if not evaluation:
        del found["evaluation"]
    path.write_text(to_toml(found))


def test_a_sites_scores_are_those_of_evaluate_on_its_own_images(run: RunFolder) -> None:
    asked = ask_sites(run)
    assert asked.round == 1 and asked.state == state_hash(run.newest().state) and not asked.refused
    data = Path(tomllib.loads((run.path / "sites" / "lyon" / "site.toml").read_text())["evaluation"]["folder"])
    own = select_site(read_labelled(data, run.config.data), "lyon")
    expected = evaluate({"backbone": release_arm(run.path / "release")}, own, (1.0,), draws=1, seed=run.config.seed)
    told = asked.scores["lyon"]
    assert told.linear["backbone"].balanced_accuracy == round(expected.score("backbone"), 3)
    assert told.nearest["backbone"].balanced_accuracy == round(expected.score("backbone", "k-NN"), 3)
    assert set(told.linear) == {"backbone", "random", "raw pixels"}
    assert (told.test_images, told.test_patients) == (expected.images["test"], expected.patients["test"])
    assert asked == read_asked(run)


def test_who_has_not_agreed_to_answer_says_so_and_the_others_are_heard(run: RunFolder) -> None:
    change(run, "oslo")
    asked = ask_sites(run)
    assert set(asked.scores) == {"lyon"}
    assert asked.refused == {"oslo": "policy: this site answers no evaluation ([evaluation] in site.toml)."}


def test_few_patients_of_a_class_are_not_told_of(run: RunFolder) -> None:
    change(run, "lyon", patients=9)
    asked = ask_sites(run)
    assert (
        asked.refused["lyon"] == "policy: a class has fewer than 9 test patients ([evaluation] patients in site.toml)."
    )


def test_who_opted_out_is_in_no_score(run: RunFolder) -> None:
    before = ask_sites(run).scores["lyon"]
    site = run.path / "sites" / "lyon" / "site.toml"
    found = tomllib.loads(site.read_text())
    found["images"]["opt_out"] = str(run.path / "opt_out.txt")
    site.write_text(to_toml(found))
    (run.path / "opt_out.txt").write_text("lyon-p4\nLYON-P0\n")  # of test and of train, as the PACS writes it
    after = ask_sites(run).scores["lyon"]
    assert (after.test_patients, after.test_images) == (before.test_patients - 1, before.test_images - 2)
    assert (after.train_patients, after.train_images) == (before.train_patients - 1, before.train_images - 2)


def test_what_ails_the_labels_stays_at_the_site(run: RunFolder) -> None:
    change(run, "lyon", label="diagnosis_of_Mr_Smith")
    asked = ask_sites(run)
    assert asked.refused["lyon"] == "images: the reason stands in the site's own log"
    assert "Smith" not in kept_at(run, 1).read_text()


def test_the_sites_log_tells_of_the_question_and_of_the_scores(run: RunFolder) -> None:
    ask_sites(run)
    rows, _ = AuditLog(run.path / "sites" / "lyon").rows()
    assert [row.crossing.kind for row in rows][-2:] == ["evaluation", "scores"]
    assert rows[-1].crossing.bytes < 2000


def test_another_state_than_the_architectures_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def evil(run: RunFolder, last: Checkpoint) -> bytes:
        return compress(pack({"evil": last.state[next(iter(last.state))]}, {}))

    monkeypatch.setattr(simulation.scoring, "whole_state", evil)
    asked = ask_sites(run)
    assert asked.refused["lyon"].startswith("policy: the coordinator's state")


def test_an_answer_that_holds_more_than_scores_is_not_taken(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ask_sites(run).scores["lyon"].to_bytes()
    text = json.loads(honest)
    for wrong in (
        {**text, "note": "patient 17"},
        {**text, "linear": {"Mr Smith": next(iter(text["linear"].values()))}},
        {**text, "classes": 2.5},
    ):
        with pytest.raises(UpdateError, match="its scores are none"):
            SiteScores.from_bytes(json.dumps(wrong).encode())
    assert SiteScores.from_bytes(honest).to_bytes() == honest


HOSTILE = [b"[" * 100_000, b'{"classes": ' + b"9" * 100_000 + b"}", b'{"classes": NaN}', b"\xff", b"\x28\xb5\x2f\xfd"]


@pytest.mark.parametrize("block", HOSTILE, ids=["brackets", "digits", "no number", "no text", "no frame"])
def test_what_no_parser_can_take_is_its_sites_refusal_and_the_others_are_heard(run: RunFolder, block: bytes) -> None:
    honest = ask_sites(run).scores["lyon"]
    asked = scoring.ask_sites(run, lambda _: iter([("oslo", block), ("lyon", honest.to_bytes())]))
    assert asked.scores == {"lyon": honest} and asked.refused["oslo"].startswith("invalid: its scores ")


def test_why_there_are_no_scores_is_one_short_line_that_moves_no_cursor(run: RunFolder) -> None:
    refusal = Refusal("policy\x1b[2J", "no\nwarning: site 'lyon': its key was stolen" + "x" * 1000)
    said = scoring.ask_sites(run, lambda _: iter([("oslo", refusal)])).refused["oslo"]
    assert said.startswith("policy?[2J: no?warning: ") and said.isprintable() and len(said) < 530


def test_a_question_is_no_round(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was signed of a question cannot be shown as a task to train: test_wire has that."""
    kinds = []

    class Watched(InProcessGrid):
        def _answer(self, message: Message) -> Message:
            kinds.append((message.metadata.message_type, message.metadata.group_id))
            return super()._answer(message)

    monkeypatch.setattr(simulation, "InProcessGrid", Watched)
    before = state_hash(open_run(run.path).newest().state)
    ask_sites(run)
    assert set(kinds) == {("evaluate", "evaluation of 1")}
    assert open_run(run.path).committed() == [0, 1] and state_hash(open_run(run.path).newest().state) == before


def test_a_federation_that_promises_a_privacy_unit_asks_for_no_scores(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 60})
    private = tiny(
        training={"rounds": 1, "local_steps": 1, "batch_size": 4},
        privacy={"unit": "patient", "epsilon": 8.0, "delta": 1e-2},
        membership={"units": {"lyon": 15}},
    )
    made = simulate(private, data, tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}", threads=1)
    with pytest.raises(
        ConfigError, match=r"scores bear no noise, and this federation promises \[privacy\] unit = 'patient'"
    ):
        ask_sites(made)
    asked = CliRunner().invoke(cli, ["evaluate", str(made.path), "--federated"])
    assert asked.exit_code != 0


def test_the_command_prints_a_table_and_writes_json(run: RunFolder, tmp_path: Path) -> None:
    change(run, "oslo")
    done = CliRunner().invoke(cli, ["evaluate", str(run.path), "--federated", "--out", str(tmp_path / "asked.json")])
    assert done.exit_code == 0, done.output
    assert "lyon" in done.output and "oslo gave none: policy" in done.output
    assert json.loads((tmp_path / "asked.json").read_text())["round"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--federated", "--draws", "3"], "--draws: is not for --federated, where each site measures by itself"),
        (["--federated", "--data", "x"], "--data: is not for --federated"),
        (["--data", "x", "--kit", "x"], "--kit: is for --federated alone"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(run: RunFolder, options: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["evaluate", str(run.path), *options])
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)


def test_without_a_question_the_labels_are_missing(run: RunFolder) -> None:
    done = CliRunner().invoke(cli, ["evaluate", str(run.path)])
    assert isinstance(done.exception, ConfigError) and "--data is missing" in str(done.exception)
