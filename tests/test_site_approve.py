"""What a person at a site reads, agrees to and takes back, and what a site agrees to by a rule."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import TINY, tiny, to_toml
from test_client_policy import PLAN, task
from typer.testing import CliRunner

from wardround.cli import cli
from wardround.client import approval
from wardround.client.policy import agreed_protocol
from wardround.config import Protocol, SiteConfig, read_site
from wardround.errors import ConfigError, PolicyRefusal

PRIVATE = {"unit": "patient", "epsilon": 2.0, "delta": 1e-6}


def site(folder: Path, **changes: Any) -> SiteConfig:
    tree = {"format": 1, "name": "lyon", "work": "work", "images": {"folder": "images"}, **changes}
    (folder / "site.toml").write_text(to_toml(tree))
    return read_site(folder / "site.toml")


def protocol(**changes: Any) -> Protocol:
    return tiny(**changes).protocol(PLAN.protocol.initial_state)


def refused(found: SiteConfig, asked: Protocol = PLAN.protocol) -> str:
    """Return why a site refuses a task of a protocol."""
    with pytest.raises(PolicyRefusal) as refusal:
        agreed_protocol(found, task(asked))
    return str(refusal.value)


def approve(folder: Path, *arguments: str, says: str | None = None) -> Result:
    return CliRunner().invoke(
        cli, ["site", "approve", str(folder / "site.toml"), *arguments], input=says, env={"COLUMNS": "200"}
    )


def test_what_was_asked_for_and_refused_is_shown_by_its_digest_and_then_runs(tmp_path: Path) -> None:
    found = site(tmp_path)
    assert f"protocol {PLAN.digest[:12]} is not approved here" in refused(found)
    assert approve(tmp_path).stdout == f"{PLAN.digest[:12]}  'tiny': waits for approval\n"
    done = approve(tmp_path, PLAN.digest[:8], "--by", "Dr. Roux", says="y\n")
    assert done.exit_code == 0 and f"approved: {PLAN.digest}" in done.stdout
    assert "Next" not in done.stdout, "a site of one process has no coordinator to run with"
    assert agreed_protocol(found, task()) == PLAN.protocol
    (word,) = approval.words(found.work)
    assert (word.who, word.said, word.digest) == ("Dr. Roux", "approved", PLAN.digest)
    assert f"'tiny': approved at {word.time}, by Dr. Roux" in approve(tmp_path).stdout
    assert approval.find(found, PLAN.digest) == PLAN.protocol, "it can be read again"


@pytest.mark.parametrize("says", ["n\n", "\n", ""])
def test_who_does_not_say_yes_has_approved_nothing(says: str, tmp_path: Path) -> None:
    found = site(tmp_path)
    refused(found)
    assert approve(tmp_path, PLAN.digest, says=says).exit_code == 1
    assert not approval.words(found.work)
    refused(found)


def test_a_federations_file_is_approved_before_anything_is_asked(tmp_path: Path) -> None:
    found, path = site(tmp_path), tmp_path / "tiny.toml"
    path.write_text(to_toml(TINY))
    assert approve(tmp_path, str(path), "--yes").exit_code == 0
    assert agreed_protocol(found, task()) == PLAN.protocol
    assert approve(tmp_path, str(path), "--withdraw").exit_code == 0
    refused(found)


def test_what_is_taken_back_does_not_run_though_site_toml_lists_it_until_it_is_approved_again(tmp_path: Path) -> None:
    found = site(tmp_path, approved=[PLAN.digest])
    assert agreed_protocol(found, task()) == PLAN.protocol
    assert approve(tmp_path, PLAN.digest[:10], "--withdraw").exit_code == 0
    assert "was approved here once, which was taken back" in refused(found)
    with pytest.raises(ConfigError, match="is approved here"):
        approval.withdraw(found, PLAN.digest)
    approval.approve(found, PLAN.protocol)
    assert agreed_protocol(found, task()) == PLAN.protocol


def test_what_leaves_and_that_images_may_be_reconstructed_is_said_in_plain_words(tmp_path: Path) -> None:
    refused(site(tmp_path))
    said = " ".join(approve(tmp_path, PLAN.digest, says="n\n").stdout.split())
    for words in (
        PLAN.digest,
        "learns to fill in hidden parts of an image",
        "vit_tiny_patch16_224",
        "2 rounds of 3 local steps of 4 images each: 6 steps",
        "none: the coordinator may be able to reconstruct images",
        "effective_rank",
        f"{sum(array.nbytes for array in PLAN.state.values()):,} bytes a round",
        "at least 16 pixels a side",
    ):
        assert words in said.replace("│", "").replace("  ", " "), words


def test_of_a_private_protocol_epsilon_at_this_site_and_its_ceiling_are_said(tmp_path: Path) -> None:
    asked = protocol(privacy=PRIVATE)
    found = site(tmp_path, privacy={"epsilon": 1.0, "delta": 1e-6, "units": 100})
    refused(found, asked)
    said = " ".join(approve(tmp_path, asked.digest(), says="n\n").stdout.replace("│", "").split())
    assert "is (2.000, 1e-06)-differentially private under adding or removing one patient at 'lyon'" in said
    assert "by 100 declared patients; this site's ceiling is 1: it would stop before the last round" in said
    assert "effective_rank" not in said and "epsilon, ledger" in said


def test_a_name_from_outside_cannot_forge_a_line_of_what_is_read(tmp_path: Path) -> None:
    asked = protocol(data={"criteria": {"modality": ["CR\x1b[2J\r\nprivacy: perfect"]}})
    refused(site(tmp_path), asked)
    said = approve(tmp_path, asked.digest(), says="n\n").stdout
    assert "\x1b" not in said and "\r" not in said
    assert not any(line.startswith("privacy: perfect") for line in said.splitlines())


def test_what_waits_is_bounded_in_number_and_size_and_read_by_nobody_else(tmp_path: Path) -> None:
    found = site(tmp_path)
    for seed in range(25):
        refused(found, protocol(seed=seed))
    kept = approval.waiting(found)
    assert sorted(one.seed for one in kept) == list(range(5, 25))
    files = list((found.work / "waiting").iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*files, found.work / "waiting"])
    refused(found, protocol(data={"criteria": {"modality": ["x" * 100_000]}}))
    assert len(list((found.work / "waiting").iterdir())) == 20 and approval.waiting(found) == kept


@pytest.mark.parametrize("reference", ["../../etc/passwd", "abc", "0" * 64, ""])
def test_a_digest_that_nobody_asked_for_is_answered_with_those_that_wait(reference: str, tmp_path: Path) -> None:
    found = site(tmp_path)
    refused(found)
    with pytest.raises(ConfigError, match=f"waits here \\({PLAN.digest[:12]}\\)"):
        approval.find(found, reference)


def test_a_damaged_record_of_approvals_approves_nothing(tmp_path: Path) -> None:
    found = site(tmp_path, approved=[PLAN.digest])
    approval.approve(found, PLAN.protocol)
    path = found.work / "approvals.jsonl"
    assert path.stat().st_mode & 0o077 == 0
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match="line 1 is no approval"):
        agreed_protocol(found, task())


RULE = {"methods": ["mae"], "units": ["patient", "none"], "rounds": 2, "epsilon": 2.0}


def test_a_rule_approves_what_it_covers_and_leaves_one_note_of_it(tmp_path: Path) -> None:
    found = site(tmp_path, approve=RULE)
    for _ in range(2):
        assert agreed_protocol(found, task()) == PLAN.protocol
    asked = protocol(privacy=PRIVATE)
    assert agreed_protocol(found, task(asked)) == asked
    assert [(word.said, word.digest) for word in approval.words(found.work)] == [
        ("by rule", PLAN.digest),
        ("by rule", asked.digest()),
    ]
    refused(site(tmp_path)), "without the rule, the note approves nothing"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"rounds": 3}}, r"[training] rounds = 3"),
        ({"method": {"name": "simclr"}}, r"[method] name = 'simclr'"),
        ({"privacy": {**PRIVATE, "unit": "image"}}, r"[privacy] unit = 'image'"),
        ({"privacy": {**PRIVATE, "epsilon": 2.1}}, r"[privacy] epsilon = 2.1"),
        ({"privacy": {**PRIVATE, "delta": 2e-5}}, r"[privacy] delta = 2e-05"),
    ],
)
def test_what_is_beyond_a_rule_by_one_key_waits_for_a_person(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    found, asked = site(tmp_path, approve=RULE), protocol(**changes)
    assert f"lies beyond [approve] in site.toml by its {key}" in refused(found, asked)
    assert approval.waiting(found) == [asked]


def test_the_rule_is_a_total_where_no_ledger_counts(tmp_path: Path) -> None:
    """A whole site's epsilon is in no ledger, and another seed makes another protocol."""
    found = site(tmp_path, approve={**RULE, "units": ["site"]})
    noised = {"unit": "site", "epsilon": 0.9, "delta": 1e-6, "clip": 1.0, "cohort": 10, "noise": "site"}

    def asked(seed: int, **changes: Any) -> Protocol:
        return protocol(privacy={**noised, **changes}, aggregation={"weights": "uniform"}, seed=seed)

    for seed in (1, 2):
        agreed_protocol(found, task(asked(seed)))
    assert "epsilon = 0.9, beside 1.8 of federations that it let run before" in refused(found, asked(3))
    agreed_protocol(found, task(asked(1)))  # those that run go on
    assert "delta = 9e-06, beside 2e-06" in refused(found, asked(3, epsilon=0.1, delta=9e-6))
    assert "noise = 'server'" in refused(found, asked(3, noise="server"))


def test_a_rule_without_noise_must_say_so(tmp_path: Path) -> None:
    found = site(tmp_path, approve={**RULE, "units": ["patient"]})
    assert "[privacy] unit = 'none'" in refused(found)
    with pytest.raises(ConfigError, match="epsilon is missing"):
        site(tmp_path, approve={"methods": ["mae"], "units": ["patient"], "rounds": 2})


def test_what_a_person_took_back_no_rule_approves(tmp_path: Path) -> None:
    found = site(tmp_path, approve=RULE)
    agreed_protocol(found, task())
    approval.approve(found, PLAN.protocol)
    approval.withdraw(found, PLAN.digest)
    assert "taken back" in refused(found)


def test_what_a_rule_let_run_is_taken_back_by_the_same_command(tmp_path: Path) -> None:
    found = site(tmp_path, approve=RULE)
    agreed_protocol(found, task())
    assert approve(tmp_path, PLAN.digest[:8], "--withdraw").exit_code == 0
    assert "taken back" in refused(found)
    agreed_protocol(site(tmp_path, approve=RULE), task(protocol(seed=9)))
    with pytest.raises(ConfigError, match="is approved here"):  # the rule would not let it run any more
        approval.withdraw(site(tmp_path, approve={**RULE, "rounds": 1}), protocol(seed=9).digest())


def test_a_site_needs_none_of_the_coordinators_public_images(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml({**TINY, "evaluation_set": {"kind": "labelled", "folder": "/at/the/coordinators"}}))
    assert approval.find(site(tmp_path), str(path)) == PLAN.protocol


def test_weights_that_are_not_here_are_named_with_the_way_to_approve_without_them(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml({**TINY, "initial_weights": "chest@candidate"}))
    with pytest.raises(
        ConfigError, match=r"tiny.toml: initial_weights: backbone 'chest@candidate': MLflow's address"
    ) as one:
        approval.find(site(tmp_path), str(path))
    assert str(one.value).endswith(
        "approve by digest, once the federation has asked: 'wardround site approve SITE_TOML' lists what waits."
    )


@pytest.mark.parametrize("digest", ["0123456789ab", "X" * 64])
def test_a_digest_in_site_toml_that_could_never_match_is_refused(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="approved"):
        site(tmp_path, approved=[digest])


def test_what_would_be_refused_though_approved_is_said_before_it_is_approved(tmp_path: Path) -> None:
    asked = protocol(training={"local_steps": 1})
    refused(site(tmp_path), asked)
    said = approve(tmp_path, asked.digest(), says="n\n").stdout
    assert "though approved, it will be refused: [training] local_steps = 1" in said


def test_the_words_of_approval_know_every_method() -> None:
    from wardround.report import agreement
    from wardround.ssl import METHODS

    assert agreement.METHODS.keys() == METHODS.keys()


def test_the_record_of_an_approval_holds_the_text_that_was_read(tmp_path: Path) -> None:
    found = site(tmp_path)
    approval.approve(found, PLAN.protocol, "x")
    line = json.loads((found.work / "approvals.jsonl").read_text())
    assert line["protocol"] == PLAN.protocol.model_dump(mode="json")
