"""What is wrong with a kit is said in one line before any process is started."""

from pathlib import Path

import pytest
from conftest import tiny

from wardround.client.supervisor import run_site
from wardround.errors import ConfigError
from wardround.provision import provision
from wardround.server.membership import members_of
from wardround.server.superlink import current_members


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provision(tiny(), tmp_path, ["lyon", "oslo"])
    path = tmp_path / "lyon" / "site.toml"
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "images"'))
    return tmp_path


def test_a_key_that_others_can_read_is_refused(kits: Path) -> None:
    (kits / "lyon" / "site.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"site\.key: other accounts can read it; 'chmod 600' it"):
        run_site(kits / "lyon" / "site.toml")


@pytest.mark.parametrize("name", ["ca.crt", "site.key"])
def test_a_file_that_is_missing_is_named(kits: Path, name: str) -> None:
    (kits / "lyon" / name).unlink()
    with pytest.raises(ConfigError, match=f"there is no file '{name}'"):
        run_site(kits / "lyon" / "site.toml")


def test_a_site_without_a_coordinator_cannot_be_run(kits: Path) -> None:
    path = kits / "lyon" / "site.toml"
    path.write_text(path.read_text().partition("[coordinator]")[0])
    with pytest.raises(ConfigError, match=r"has no \[coordinator\]; take that section from the kit"):
        run_site(path)


def test_the_members_of_a_run_are_those_with_a_key_that_the_config_lists(kits: Path) -> None:
    found = members_of(kits / "coordinator", tiny()).keys
    assert list(found) == ["lyon", "oslo"]
    assert found["lyon"].startswith("-----BEGIN PUBLIC KEY-----")
    fewer = tiny(membership={"sites": {"oslo": 2.0}})
    provision(fewer, kits)
    assert list(members_of(kits / "coordinator", fewer).keys) == ["oslo"]


def test_a_member_without_a_key_is_named(kits: Path) -> None:
    with pytest.raises(ConfigError, match="has no key of site 'pisa'; make its kit with 'wardround provision"):
        members_of(kits / "coordinator", tiny(membership={"sites": {"oslo": 1.0, "pisa": 1.0}}))


def test_a_folder_that_is_not_the_coordinators_kit_is_refused(kits: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no server\.crt; give --kit the 'coordinator' folder"):
        current_members(kits / "lyon", tiny(), kits / "run")
