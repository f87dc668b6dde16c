"""From a committed round to a signed release: its lineage, and what of it stays at the sites."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from honest_sites import SITES, Sites, ignore, make_run
from test_server_privacy import PATIENT, PrivateSites

from wardround.config import FederationConfig, digest, parse
from wardround.downstream import segment
from wardround.downstream.evaluate import Request, evaluate_backbone
from wardround.downstream.load import load_backbone
from wardround.errors import CheckpointError, ConfigError, DataError
from wardround.plan import resolve
from wardround.provision import lines, provision
from wardround.registry import release, signing
from wardround.registry.mlflow_store import Store
from wardround.registry.promotion import examine, promote
from wardround.server import tracking
from wardround.server.release import export, read_scores
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, create
from wardround.server.spool import Spool
from wardround.signatures import fingerprint
from wardround.update import Task, Update

EVALUATED = {"evaluation_set": {"kind": "procedural", "count": 64}}


def trained(path: Path, sites: type[Sites] = Sites, **changes: Any) -> RunFolder:
    run = make_run(path, **changes)
    run_rounds(run, sites(run), ignore)
    return run


def lineage(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((folder / "provenance.json").read_bytes())
    return said


def tracked(run: RunFolder, uri: str) -> RunFolder:
    return dataclasses.replace(run, tracking=uri)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: str) -> RunFolder:
    """A run whose rounds are committed and whose coordinator has images of its own."""
    home = tmp_path_factory.mktemp("run")
    trained(home / "run", **EVALUATED)
    return create(home / "run", resolve(tiny(**EVALUATED)), {site: f"in-process:{site}" for site in SITES}, store)


@pytest.fixture(scope="module")
def folder(run: RunFolder) -> Path:
    return export(run)


def test_the_lineage_says_what_made_the_backbone_and_names_nobody(run: RunFolder, folder: Path) -> None:
    said = lineage(folder)
    assert said["federation_digest"] == digest(run.config) and said["protocol_digest"] == run.digest
    assert (said["round"], said["rounds"], said["method"], said["modality"]) == (2, 2, "mae", "generic")
    assert said["sites"]["oslo"] == {
        "weight": pytest.approx(115 / (112 + 115 + 123)),
        "rounds": 2,
        "images": 115,
        "patients": 5,
    }
    assert said["differential_privacy"] == "none" and said["gate"] == {"tolerance": 0.01, "epsilon": None}
    assert said["stock_timm"] is True and said["parent"] is None
    assert len(said["software"]["lock"]) == len(said["software"]["sources"]) == 64
    assert str(run.path) not in (folder / "provenance.json").read_text()
    assert said["membership"].keys() >= {"sites", "min_sites"} and "server_names" not in said["membership"]


def test_the_coordinators_own_set_gives_the_probes_with_their_floors_and_the_spread(folder: Path) -> None:
    said = lineage(folder)
    assert said["evaluation"]["by"] == "the coordinator's evaluation_set"
    assert said["evaluation"]["probes"].keys() == {"k-NN", "linear"}
    assert said["evaluation"]["probes"]["linear"].keys() == {"backbone", "random", "raw pixels"}
    assert said["features"]["of"] == "64 images of the coordinator's evaluation_set"
    assert 1.0 <= said["features"]["effective_rank"] <= 64


def test_the_release_is_signed_with_the_run_folders_own_key(run: RunFolder, folder: Path) -> None:
    assert release.signer(folder) == fingerprint(signing.release_key(run.path / "release.key").public_key())
    assert (run.path / "release.key").stat().st_mode & 0o777 == 0o600


def test_the_card_has_yaml_that_reads_and_the_sections_of_a_model_card(folder: Path) -> None:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["library_name"] == "timm" and "self-supervised" in said["tags"]
    for section in ("Model details", "Intended use", "Training data", "Privacy", "Evaluation", "Provenance"):
        assert f"\n## {section}\n" in body
    assert "None: the coordinator may have been able to reconstruct images." in body
    linear = lineage(folder)["evaluation"]["probes"]["linear"]
    assert f"| linear | {linear['backbone']:.3f} | {linear['random']:.3f} | {linear['raw pixels']:.3f} |" in body


def test_the_bill_of_materials_is_valid_cyclonedx_of_what_is_installed(folder: Path) -> None:
    text = (folder / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert {"torch", "timm", "wardround"} <= {component["name"] for component in bill["components"]}
    assert bill["metadata"]["component"]["hashes"][0]["content"] == lineage(folder)["sha256"]["model.safetensors"]


def test_a_release_that_is_there_is_left_until_its_config_signer_or_round_changes(run: RunFolder, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert export(run) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "README.md").write_text("altered")
    export(run)
    assert "altered" not in (folder / "README.md").read_text()
    stricter = parse({**run.config.model_dump(mode="json"), "release": {"tolerance": 0.5}}, FederationConfig, "x")
    assert lineage(export(dataclasses.replace(run, config=stricter)))["gate"]["tolerance"] == 0.5
    assert stricter.protocol("0" * 64).digest() == run.config.protocol("0" * 64).digest()  # no site approves it anew
    assert lineage(export(run))["gate"]["tolerance"] == 0.01


def test_every_committed_round_becomes_a_candidate_and_the_one_before_its_parent(run: RunFolder, store: str) -> None:
    assert tracking.register(run.path) == "tiny/1"
    assert tracking.register(run.path) == "tiny/1"
    assert tracking.register(run.path, 1) == "tiny/2"
    rows = {row.version: row for row in Store(store).models("tiny")}
    assert (rows["1"].round, rows["2"].round) == (2, 1)
    assert rows["2"].aliases == ("candidate",) and rows["2"].tags["parent"] == "tiny/1"
    assert json.loads(rows["1"].tags["probe"]).keys() == {"backbone", "random", "raw pixels"}
    assert rows["1"].tags["privacy"] == "none" and "lyon/loss" not in rows["1"].metrics
    promote(Store(store), "tiny/1", "Ada", "the last round", None, lambda _: None)
    with pytest.raises(ConfigError, match="has no committed round 3; it has 1 to 2"):
        tracking.register(run.path, 3)


def test_a_run_that_starts_from_a_release_names_its_version_as_parent(
    run: RunFolder, folder: Path, tmp_path: Path, store: str
) -> None:
    reference = tracking.register(run.path)
    child = tracked(trained(tmp_path / "child", name="child", initial_weights=str(export(run))), store)
    assert child.start == lineage(folder)["sha256"]["model.safetensors"]
    said = lineage(export(child, rows=Store(store).models()))
    assert said["parent"] == {"version": reference, "weights": child.start, "by": "initial_weights"}
    unknown = lineage(export(child, 1))
    assert unknown["parent"]["version"] == "not registered here" and unknown["parent"]["weights"] == child.start


def test_with_patients_as_unit_the_counts_are_the_declared_ones(tmp_path: Path) -> None:
    said = lineage(export(trained(tmp_path / "run", PrivateSites, **PATIENT)))
    assert said["sites"]["oslo"] == {"weight": 0.3, "rounds": 2, "units": 60}
    assert said["gate"]["epsilon"] == 8.0
    assert "missing" in said["evaluation"] and said["features"]["missing"].startswith("sites withhold it")
    body = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "declared units" in body and "(2.500, 0.001)-differentially private" in body
    assert tracking.tags_of(said)["privacy"] == "epsilon 2.500, add or remove one patient, delta 0.001"


def test_an_earlier_round_promises_what_all_committed_rounds_spent(tmp_path: Path) -> None:
    """It was chosen in sight of the later ones, so that they have their part in it."""
    run = trained(tmp_path / "run", PrivateSites, **PATIENT)
    assert lineage(export(run, 1))["differential_privacy"]["epsilon"]["lyon"] == 2.5


def test_with_sites_as_unit_no_count_of_a_site_is_told(tmp_path: Path) -> None:
    privacy = {"unit": "site", "epsilon": 8.0, "delta": 1e-3, "clip": 1.0, "cohort": 3}
    run = trained(tmp_path / "run", privacy=privacy, aggregation={"weights": "uniform"})
    said = lineage(export(run))
    assert {frozenset(one) for one in said["sites"].values()} == {frozenset({"weight", "rounds"})}
    assert said["features"]["missing"].startswith("sites withhold it")
    assert said["differential_privacy"]["epsilon"] <= 8.0


def test_without_an_evaluation_set_collapse_shows_in_what_the_sites_declared(tmp_path: Path) -> None:
    class OneCollapsed(Sites):
        def update(self, site: str, task: Task) -> Update:
            update = super().update(site, task)
            declared = dataclasses.replace(update.declared, effective_rank=1.2 if site == "oslo" else 9.0)
            return dataclasses.replace(update, declared=declared)

    said = lineage(export(trained(tmp_path / "run", OneCollapsed)))
    assert said["features"]["effective_rank"] == 1.2
    assert said["evaluation"] == {"missing": "the federation's file names no [evaluation_set]"}


def scores(**changes: Any) -> dict[str, Any]:
    mean = {"balanced_accuracy": 0.7, "auc": 0.8}
    rows = [
        {"arm": arm, "probe": "linear", "fraction": fraction, "mean": mean if fraction == 1.0 else dict(mean, auc=0.1)}
        for fraction in (0.1, 1.0)
        for arm in ("backbone", "random")
    ]
    return {"rows": rows, "classes": ["a", "b"], "images": {"test": 9}, "patients": {"test": 3}, "seed": 0, **changes}


def test_scores_of_an_evaluation_stand_in_the_lineage_in_place_of_probes(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores()))
    said = lineage(export(trained(tmp_path / "run"), scores=path))
    assert said["evaluation"]["probes"] == {"linear": {"backbone": 0.7, "random": 0.7}}
    assert said["evaluation"]["by"].startswith("wardround evaluate, as whoever registered it said")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(scores(classes=["a", "c"])))
    assert read_scores(other)[1]["set"] != read_scores(path)[1]["set"]


def test_a_card_says_of_how_many_of_the_labels_its_scores_are(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores(rows=scores()["rows"][:2], images={"train": 80, "test": 9})))
    run = trained(tmp_path / "run")

    def body() -> str:
        return (export(run, scores=path) / "README.md").read_text()

    assert "images: 80 train, 9 test; 0.1 of the training labels.\n" in body()
    path.write_text(json.dumps(scores(images={"train": 80, "test": 9})))
    assert "images: 80 train, 9 test.\n" in body()
    rows = [{**row, "mean": {"balanced_accuracy": None, "auc": 0.8}} for row in scores()["rows"]]
    path.write_text(json.dumps(scores(rows=rows)))
    assert "\nAUC by wardround evaluate" in body()


def test_what_makes_scores_doubtful_goes_with_them_to_the_card_and_the_gate_and_no_name_does(tmp_path: Path) -> None:
    forced = "FORCED: 2 of 9 patients are in more than one split (2 in train and test), so the scores measure in part"
    notes = [forced, "NO PATIENT: 4 of 9 images name none", "warning: group patient = Ada: too small to tell"]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores(notes=notes)))
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = tracked(trained(tmp_path / "run"), store)
    tracking.Tracking(run).release(scores=path)
    body = (run.path / "release" / "README.md").read_text()
    assert f"**{forced}**" in body and "**NO PATIENT: 4 of 9 images name none**" in body and "Ada" not in body
    assert "Ada" not in (run.path / "release" / "provenance.json").read_text()
    (probe,) = [one for one in examine(Store(store), "tiny@candidate", None).conditions if one.what == "probe"]
    assert isinstance(probe.found, str) and forced in probe.found


def test_scores_of_what_was_trained_on_too_are_a_cards_table_with_gaps(tmp_path: Path) -> None:
    """What `wardround evaluate --finetune full` wrote: not every arm is trained on, and the random one from scratch."""
    mean = {"balanced_accuracy": 0.9, "auc": 0.9}
    tuned = [("backbone", "full"), ("random", "scratch")]
    rows = [{"arm": arm, "probe": probe, "fraction": 1.0, "mean": mean} for arm, probe in tuned]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores(rows=[*scores()["rows"], *rows])))
    body = (export(trained(tmp_path / "run"), scores=path) / "README.md").read_text()
    assert "| linear | 0.700 | 0.700 |\n| full | 0.900 |  |\n| scratch |  | 0.900 |\n" in body


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "scores.json: cannot be read: No such file or directory.$"),
        ("no json", "is not what 'wardround evaluate --out' writes"),
        (json.dumps(scores(weights="1" * 64)), "is of other weights"),
    ],
)
def test_scores_that_are_refused_leave_the_release_that_is_there(
    tmp_path: Path, content: str | None, words: str
) -> None:
    run = trained(tmp_path / "run")
    before = release.check(export(run))
    if content is not None:
        (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        export(run, scores=tmp_path / "scores.json")
    assert release.check(run.path / "release") == before
    assert not list(run.path.glob(".release*"))


def test_scores_that_cannot_be_read_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "run")
    monkeypatch.setattr("wardround.backbones.save_release", None)  # whoever calls it fails
    with pytest.raises(ConfigError, match="cannot be read"):
        export(run, scores=tmp_path / "scores.json")


def test_a_release_stays_where_the_next_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run")
    before = release.check(export(run))
    stricter = parse({**run.config.model_dump(mode="json"), "release": {"tolerance": 0.5}}, FederationConfig, "x")

    def fails(*_: Any) -> None:
        raise DataError("the images are gone")

    monkeypatch.setattr("wardround.server.release.measure", fails)
    with pytest.raises(DataError):
        export(dataclasses.replace(run, config=stricter))
    assert release.check(run.path / "release") == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(scores(rows=[])), "is not what 'wardround evaluate --out' writes"),
        ("[1, 2]", "is not what 'wardround evaluate --out' writes"),
        ("no json", "is not what 'wardround evaluate --out' writes"),
    ],
)
def test_scores_of_something_else_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_scores(tmp_path / "scores.json")


def test_a_networks_run_is_released_by_its_coordinators_key_alone(run: RunFolder, tmp_path: Path, store: str) -> None:
    networked = trained(tmp_path / "run", name="networked")
    pem = "-----BEGIN PUBLIC KEY-----"
    create(networked.path, resolve(tiny(name="networked")), dict.fromkeys(SITES, pem), store)
    with pytest.raises(ConfigError, match="was trained over a network, and its coordinator signs"):
        tracking.register(networked.path)
    provision(tiny(name="networked"), tmp_path / "kits", ["lyon"])
    kit = tmp_path / "kits" / "coordinator"
    reference = tracking.register(networked.path, kit=kit)
    assert (kit / "release.key").stat().st_mode & 0o777 == 0o600
    assert not (networked.path / "release.key").exists()
    (printed,) = [line for line in lines(tmp_path / "kits") if line.startswith("releases are signed by")]
    pin = printed.split()[4].rstrip(";")
    assert release.signer(Store(store).pull(reference, tmp_path / "pulled", pin)) == pin
    (kit / "release.key").unlink()
    with pytest.raises(ConfigError, match=r"has no release.key; 'wardround provision FEDERATION.toml' adds"):
        tracking.register(networked.path, kit=kit)


def test_a_backbone_fetched_by_name_is_verified_against_the_pinned_key(
    run: RunFolder, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tracking.register(run.path)
    pin = fingerprint(signing.release_key(run.path / "release.key").public_key())
    load_backbone(reference, uri=store)
    assert f"origin not verified: signed by {pin}, and no key is pinned" in caplog.text
    caplog.clear()
    load_backbone(reference, uri=store, trust=pin)
    assert "origin" not in caplog.text
    monkeypatch.setenv("WARDROUND_TRUST", "SHA256:" + "A" * 43)
    with pytest.raises(CheckpointError, match="is signed by SHA256:"):
        load_backbone(reference, uri=store)
    monkeypatch.delenv("WARDROUND_TRUST")
    other = "SHA256:" + "A" * 43
    with pytest.raises(CheckpointError, match="is signed by SHA256:"):
        evaluate_backbone(Request(source=reference, data=run.path, tracking=store, trust=other))
    with pytest.raises(CheckpointError, match="is signed by SHA256:"):
        segment.segment(segment.Request(reference, run.path, tracking=store, trust=other))


def test_a_sites_update_that_a_kill_left_behind_is_deleted_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    def killed(_: Spool) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Spool, "drop_updates", killed)
        run_rounds(run, Sites(run), ignore)
    run_rounds(run, Sites(run), ignore)
    assert run.committed() == [0, 1, 2]
    assert not list(run.path.rglob("updates"))
