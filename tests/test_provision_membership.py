"""Who takes part: signed, in one file, by versions that only go up; keys that were taken back stay out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, another_account, tiny, to_toml

from wardround.cli.provisioning import provision_kits
from wardround.config import FederationConfig, read_toml
from wardround.errors import CheckpointError, ConfigError
from wardround.plan import resolve
from wardround.processes import alone
from wardround.provision import add, answer, lines, prepare, provision, renew, revoke, rotate
from wardround.provision.request import init
from wardround.server.membership import Members, members_of, read_members, read_membership, write_members
from wardround.server.roster import Roster, changes
from wardround.server.run_folder import RunFolder, create, open_run
from wardround.server.superlink import coordinate, current_members
from wardround.signatures import certificate_names
from wardround.simulate import simulate


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tiny(), tmp_path / "kits", ["lyon", "oslo"])
    return tmp_path / "kits"


def run_of(kits: Path, **membership: Any) -> RunFolder:
    """Return a run folder as `wardround coordinate` makes it."""
    config = tiny(membership=membership)
    members = current_members(kits / "coordinator", config, kits.parent / "run")
    return create(kits.parent / "run", resolve(config), members.keys, "", members.version)


def test_what_nobody_changed_is_not_signed_again(kits: Path) -> None:
    before = (kits / "coordinator" / "membership.json").read_bytes()
    provision(tiny(), kits, ["lyon", "oslo"])
    assert (kits / "coordinator" / "membership.json").read_bytes() == before


def test_all_sites_that_join_at_once_are_one_version(kits: Path) -> None:
    assert read_membership(kits / "coordinator").version == 1
    provision(tiny(), kits, ["lyon", "oslo", "pisa", "wien"])
    assert read_membership(kits / "coordinator").version == 2


@pytest.mark.parametrize(
    "change", [{"address": "evil:1"}, {"version": 99}, {"revoked": {}}, {"settings": {"min_sites": 1}}, {"keys": {}}]
)
def test_a_membership_that_the_coordinator_did_not_sign_is_refused(change: dict[str, Any], kits: Path) -> None:
    revoke(kits, "oslo")
    path = kits / "coordinator" / "membership.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(ConfigError, match=r"is not what the coordinator's signing\.key signed"):
        read_membership(kits / "coordinator")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"signature": "?"}', '{"signature": 3}'])
def test_a_file_that_is_no_membership_is_refused_in_one_line(text: str, kits: Path) -> None:
    (kits / "coordinator" / "membership.json").write_text(text)
    with pytest.raises(ConfigError, match="is no signed membership; put the original back"):
        read_membership(kits / "coordinator")


def test_a_site_makes_its_own_key_and_no_private_key_travels(tmp_path: Path) -> None:
    kits, home = tmp_path / "kits", tmp_path / "home"
    prepare(tiny(membership={"sites": {"lyon": 1.0}}), kits)
    assert [path.name for path in kits.iterdir()] == ["coordinator"]
    path, key = init(home, "lyon")
    kit = answer(kits, path)
    assert "site.key" not in {file.name for file in kit.iterdir()}
    secret = (home / "site.key").read_bytes()
    assert all(secret not in file.read_bytes() for file in kits.rglob("*") if file.is_file())
    assert list(members_of(kits / "coordinator", tiny(membership={"sites": {"lyon": 1.0}})).keys) == ["lyon"]
    assert init(home, "lyon")[1] == key, "a second call keeps the key"
    answer(kits, path)  # and signing twice changes nothing
    assert "site.key" not in {file.name for file in kit.iterdir()}


def test_where_no_site_is_listed_the_coordinator_comes_first_and_each_kit_is_added(tmp_path: Path) -> None:
    kits, config = tmp_path / "kits", read_toml(ROOT / "federation_configs" / "malaria_private.toml", FederationConfig)
    assert not config.membership.sites
    provision(config, kits)
    assert [path.name for path in kits.iterdir()] == ["coordinator"]
    with pytest.raises(ConfigError, match=r"has no site's key; make each kit with 'wardround provision add SITE --out"):
        members_of(kits / "coordinator", config)
    for site in config.membership.units:
        add(kits, site)
    with pytest.raises(ConfigError, match="units: no declared number of patients for 'lyon'; add one"):
        add(kits, "lyon")
    assert members_of(kits / "coordinator", config).keys.keys() == config.membership.units.keys()


def test_a_second_run_completes_the_kits_of_sites_that_no_file_lists(tmp_path: Path) -> None:
    provision(tiny(), tmp_path)
    add(tmp_path, "lyon")
    add(tmp_path, "oslo")
    (tmp_path / "lyon" / "README.md").unlink()
    shutil.rmtree(tmp_path / "oslo")  # handed over
    before = (tmp_path / "coordinator" / "membership.json").read_bytes()
    provision(tiny(), tmp_path)
    assert (tmp_path / "lyon" / "README.md").exists()
    assert not (tmp_path / "oslo").exists()
    assert (tmp_path / "coordinator" / "membership.json").read_bytes() == before


def test_what_to_type_next_is_a_kit_until_there_is_a_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, kits = tmp_path / "tiny.toml", tmp_path / "kits"
    path.write_text(to_toml(TINY))
    provision_kits(path, kits)
    assert f"Next:\n  wardround provision add SITE --out {kits}   (for each site:" in capsys.readouterr().out
    add(kits, "lyon")
    provision_kits(path, kits)
    assert f"Next:\n  wardround coordinate {path}" in capsys.readouterr().out


def test_a_request_whose_sender_does_not_have_the_key_is_refused(kits: Path, tmp_path: Path) -> None:
    path, _ = init(tmp_path / "home", "pisa")
    body = path.read_text().splitlines()
    body[-2] = body[-2][:-12] + "A" * 8 + body[-2][-4:]
    path.write_text("\n".join(body))
    with pytest.raises(ConfigError, match=r"pisa\.csr: is (not signed with the key|no certificate request)"):
        answer(kits, path)
    path.write_text("no request")
    with pytest.raises(ConfigError, match=r"pisa\.csr: is no certificate request; let the site make it"):
        answer(kits, path)


@pytest.mark.parametrize("name", ["../oslo", "coordinator", ""])
def test_a_request_cannot_name_a_folder_of_its_own_choice(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a site"):
        init(tmp_path / "home", name)
    assert not (tmp_path / "home").exists()


def test_another_sites_key_is_refused(kits: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    shutil.copy(kits / "lyon" / "site.key", tmp_path / "home" / "site.key")
    path, _ = init(tmp_path / "home", "pisa")
    with pytest.raises(ConfigError, match="site 'pisa': has the key of site 'lyon'; let it make its own"):
        answer(kits, path)


def test_a_request_does_not_replace_a_key_in_silence(kits: Path, tmp_path: Path) -> None:
    path, _ = init(tmp_path / "home", "lyon")
    with pytest.raises(ConfigError, match=r"takes part with another key, SHA256:.*'wardround provision rotate"):
        answer(kits, path)


def test_a_revoked_key_never_comes_back_but_its_site_may(kits: Path) -> None:
    old = read_membership(kits / "coordinator").keys["lyon"]
    revoke(kits, "lyon")
    provision(tiny(), kits, ["lyon", "oslo"])  # still listed: stays out
    assert list(read_membership(kits / "coordinator").active) == ["oslo"]
    with pytest.raises(ConfigError, match=r"was revoked, and is never let in again; move .*lyon away"):
        add(kits, "lyon")
    (kits / "lyon").rename(kits / "was-lyon")
    add(kits, "lyon")
    assert read_membership(kits / "coordinator").keys["lyon"] != old
    assert not [line for line in lines(kits) if line.endswith("revoked")]
    with pytest.raises(ConfigError, match="site 'wien': has no key; sites with one: lyon, oslo"):
        revoke(kits, "wien")


def test_a_new_key_takes_the_old_ones_place_and_no_kit_is_written_over(kits: Path, tmp_path: Path) -> None:
    old = read_membership(kits / "coordinator").keys
    with pytest.raises(ConfigError, match="is the kit with the key of before; move it away first"):
        rotate(kits, "lyon")
    (kits / "lyon").rename(tmp_path / "lyon")
    rotate(kits, "lyon")
    new = read_membership(kits / "coordinator").keys
    assert new["lyon"] != old["lyon"] and new["oslo"] == old["oslo"]
    (kits / "oslo").rename(tmp_path / "oslo")
    with pytest.raises(ConfigError, match="has the key that site 'oslo' has already; let it make another one first"):
        rotate(kits, str(init(tmp_path / "oslo", "oslo")[0]))


def test_a_renewed_certificate_is_another_for_the_same_names_and_key(kits: Path) -> None:
    server = kits / "coordinator" / "server.crt"
    before, key = server.read_bytes(), (kits / "coordinator" / "server.key").read_bytes()
    renew(kits)
    assert server.read_bytes() != before
    assert certificate_names(server.read_bytes()) == certificate_names(before)
    assert (kits / "coordinator" / "server.key").read_bytes() == key


def test_a_site_that_the_config_does_not_list_is_refused(tmp_path: Path) -> None:
    provision(tiny(membership={"sites": {"lyon": 1.0}}), tmp_path)
    with pytest.raises(ConfigError, match=r"site 'oslo' is not in \[membership\] sites of federation"):
        add(tmp_path, "oslo")


def private(units: dict[str, int], **more: Any) -> FederationConfig:
    return tiny(privacy={"unit": "patient", "epsilon": 8.0, "delta": 1e-5}, membership={"units": units, **more})


def test_a_site_without_declared_patients_does_not_join_a_private_federation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="units: no declared number of patients for 'oslo'; add one"):
        provision(private({"lyon": 100}), tmp_path, ["lyon", "oslo"])
    assert not list(tmp_path.iterdir())
    provision(private({"lyon": 100}), tmp_path, ["lyon"])
    with pytest.raises(ConfigError, match="units: no declared number of patients for 'oslo'; add one"):
        add(tmp_path, "oslo")
    assert not (tmp_path / "oslo").exists()
    provision(private({"lyon": 100, "oslo": 50}), tmp_path, ["oslo"])
    assert sorted(read_membership(tmp_path / "coordinator").active) == ["lyon", "oslo"]


def test_an_account_that_may_not_read_the_coordinators_folder_is_told_in_one_line(kits: Path) -> None:
    """As the one that made it is, once the folder belongs to the container's account."""
    home = kits / "coordinator"
    calls: list[Callable[[], object]] = [
        lambda: add(kits, "pisa"),
        lambda: revoke(kits, "lyon"),
        lambda: lines(kits),
        lambda: renew(kits),
        lambda: provision(tiny(), kits),
        lambda: prepare(tiny(), kits),
    ]
    for call in calls:
        told = rf"^{home}: account \d+ may not read it; take the account that owns it, or sudo and then 'chown' what"
        with another_account(home), pytest.raises(ConfigError, match=told):
            call()


def test_what_sudo_wrote_and_nobody_gave_back_is_named(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = kits / "coordinator" / "membership.json", Path.open

    def closed(self: Path, *arguments: Any, **named: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ConfigError, match=rf"^{path}: account \d+ may not read it"):
        revoke(kits, "lyon")


def test_more_sites_than_the_declared_cohort_are_refused(tmp_path: Path) -> None:
    privacy = {"unit": "site", "noise": "server", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "cohort": 2}
    config = tiny(privacy=privacy, aggregation={"weights": "uniform"})
    provision(config, tmp_path, ["lyon", "oslo"])
    with pytest.raises(ConfigError, match=r"cohort = 2: there are 3 sites; declare them all"):
        add(tmp_path, "pisa")


def test_what_the_config_says_of_sites_and_patience_holds_once_it_is_signed(kits: Path) -> None:
    with pytest.raises(ConfigError, match=r"wait_seconds = 1\.0: .*was signed with 600\.0; sign the change with"):
        run_of(kits, wait_seconds=1.0)
    provision(tiny(membership={"wait_seconds": 1.0}), kits, ["lyon", "oslo"])
    assert run_of(kits, wait_seconds=1.0).config.membership.wait_seconds == 1.0


def test_another_federations_kit_is_refused(kits: Path) -> None:
    with pytest.raises(ConfigError, match="is of federation 'tiny', expected 'other'; name its own kit"):
        members_of(kits / "coordinator", tiny(name="other"))
    with pytest.raises(ConfigError, match="is of federation 'tiny', not 'other'; give another --out"):
        provision(tiny(name="other"), kits, ["lyon"])


def test_an_older_membership_does_not_let_a_revoked_site_in_again(kits: Path) -> None:
    path = kits / "coordinator" / "membership.json"
    old = path.read_bytes()
    revoke(kits, "lyon")
    assert list(run_of(kits).members) == ["oslo"]
    path.write_bytes(old)
    with pytest.raises(CheckpointError, match=r"its membership is version 1, and run folder .* has taken over 2"):
        run_of(kits)
    assert list(open_run(kits.parent / "run").members) == ["oslo"]


class Told:
    """What a SuperLink would be told, noted in its place; tests/test_provision_live.py tells a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys = list[list[str]]()
        monkeypatch.setattr("wardround.server.roster.admit", lambda _, keys: self.keys.append(sorted(keys)))


def test_in_a_round_only_taken_back_keys_count_and_all_else_between_rounds(
    kits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, told = run_of(kits), Told(monkeypatch)
    roster = Roster(kits / "coordinator", run.path)
    assert not roster.cut_off()
    add(kits, "pisa")
    revoke(kits, "lyon")
    assert roster.cut_off()
    assert not roster.cut_off(), "once is enough"
    assert sorted(open_run(run.path).members) == ["oslo"]
    roster.take_over()
    roster.take_over()
    assert sorted(open_run(run.path).members) == ["oslo", "pisa"]
    assert told.keys == [["oslo"], ["oslo", "pisa"]]
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "the key of site 'lyon' is taken back",
        "site 'pisa' joins",
    ]
    assert open_run(run.path).digest == run.digest


def test_what_a_kill_leaves_is_the_old_membership_or_the_new_one_whole(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(kits)
    provision(tiny(membership={"wait_seconds": 5.0}), kits, ["lyon", "oslo", "pisa"])
    roster = Roster(kits / "coordinator", run.path)

    class Cut(BaseException):
        pass

    def cut(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", cut)
        with pytest.raises(Cut):
            roster.take_over()
    old = open_run(run.path)
    assert (sorted(old.members), old.config.membership.wait_seconds) == (["lyon", "oslo"], 600.0)
    with monkeypatch.context() as patch:
        patch.setattr("wardround.server.roster.admit", cut)
        with pytest.raises(Cut):
            roster.take_over()
    new = open_run(run.path)
    assert (sorted(new.members), new.config.membership.wait_seconds) == (["lyon", "oslo", "pisa"], 5.0)


def test_a_membership_that_is_no_good_is_said_once_and_the_one_before_stays(
    kits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, told = run_of(kits), Told(monkeypatch)
    roster, path = Roster(kits / "coordinator", run.path), kits / "coordinator" / "membership.json"
    path.write_bytes(path.read_bytes().replace(b"localhost", b"evilhosts"))
    for _ in range(3):
        assert not roster.cut_off()
        roster.take_over()
    path.unlink()
    roster.take_over()
    assert [line.partition(": ")[0] for line in caplog.messages] == ["warning", "warning"]
    assert sorted(open_run(run.path).members) == ["lyon", "oslo"]
    assert told.keys == []


def test_a_change_is_named_line_by_line() -> None:
    settings = tiny().membership
    before = Members(settings=settings, keys={"lyon": "a", "oslo": "b"})
    after = Members(settings=settings.model_copy(update={"min_sites": 2}), keys={"oslo": "c", "pisa": "d"})
    assert changes(before, after) == [
        "the key of site 'lyon' is taken back",
        "the key of site 'oslo' is taken back",
        "site 'oslo' joins",
        "site 'pisa' joins",
        "min_sites = 2",
    ]


def test_damaged_members_of_a_run_are_refused(tmp_path: Path) -> None:
    write_members(tmp_path / "members.json", Members(settings=tiny().membership, keys={}))
    (tmp_path / "members.json").write_bytes((tmp_path / "members.json").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"members\.json: cannot be read; the run folder is damaged"):
        read_members(tmp_path / "members.json")


def test_a_second_coordinator_leaves_the_members_of_the_one_that_runs_alone(kits: Path, tmp_path: Path) -> None:
    run = run_of(kits)
    roster = Roster(kits / "coordinator", run.path)
    add(kits, "wien")
    path = tmp_path / "federation.toml"
    path.write_text(to_toml(TINY))
    with alone(run.path / "flower", "wardround coordinate"), pytest.raises(ConfigError, match="works in it"):
        coordinate(path, kits / "coordinator", run.path, 1, "")
    assert roster._newer()[0] is not None, "or else nobody would tell SuperLink of the site that joins"


def test_the_run_of_a_network_is_none_to_simulate(kits: Path, labelled: Path) -> None:
    run = run_of(kits)
    with pytest.raises(ConfigError, match="is of a network"):
        simulate(tiny(), labelled, run.path, "")
    assert read_members(run.path / "members.json").version == 1
    assert not (run.path / "sites").exists()
