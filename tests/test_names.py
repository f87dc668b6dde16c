"""Names that cross become files, folders and lines of logs: one that leads elsewhere is refused where it comes in."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import tiny
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from honest_sites import DECLARED
from test_client_policy import PLAN, site

from wardround.client.kit import KIND, check_kit
from wardround.client.policy import agreed_protocol
from wardround.config import FederationConfig, SiteConfig, parse, read_site
from wardround.errors import ConfigError, PolicyRefusal, UpdateError
from wardround.provision import provision
from wardround.signatures import sign
from wardround.update import Task, Update, pack, unpack

ELSEWHERE = ["../x", "/etc/x", "a/../../x", "..", ".x", "", "a\\b", "a\nb", "a\x00b", "x" * 64]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_protocols_name_that_leads_elsewhere_is_refused_by_the_site(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {**PLAN.protocol.model_dump(mode="json"), "name": name}
    with pytest.raises(PolicyRefusal, match="the protocol cannot be read"):
        agreed_protocol(site(PLAN.digest), Task(1, json.dumps(fields), 0, b""))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_sites_name_that_leads_elsewhere_is_refused_in_either_file(name: str) -> None:
    with pytest.raises(ConfigError):
        parse({"format": 1, "name": name, "work": "w", "images": {"folder": "i"}}, SiteConfig, "site.toml")
    for table in ("sites", "units"):
        raw = {**tiny().model_dump(mode="json"), "membership": {table: {name: 1}}}
        with pytest.raises(ConfigError):
            parse(raw, FederationConfig, "federation.toml")


@pytest.mark.parametrize("name", ["../x", "images\n", "loss/../../x", "__class__", "path"])
def test_a_figure_that_is_not_on_the_list_is_refused_whatever_its_name(name: str) -> None:
    block = Update("lyon", "0" * 64, 1, "0" * 64, DECLARED, {}).to_bytes()
    delta, header = unpack(block)
    header["declared"][name] = 1.0
    with pytest.raises(UpdateError, match="lacks or adds fields"):
        Update.from_bytes(pack(delta, header))


@pytest.mark.parametrize("version", ["0.1\n", "\x1b[2J", "x" * 101])
def test_a_declared_text_that_is_no_short_line_is_refused(version: str) -> None:
    with pytest.raises(UpdateError, match="declared field 'version'"):
        dataclasses.replace(DECLARED, version=version)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "sub/x"])
def test_a_kit_that_names_a_file_elsewhere_is_refused_though_it_is_signed(name: str, tmp_path: Path) -> None:
    provision(tiny(), tmp_path / "kits", ["lyon"])
    kit = tmp_path / "kits" / "lyon"
    (tmp_path / "x").write_text("")
    key = load_pem_private_key((tmp_path / "kits" / "coordinator" / "signing.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    sums = (kit / "SHA256SUMS").read_bytes() + f"{'0' * 64}  {name}\n".encode()
    (kit / "SHA256SUMS").write_bytes(sums)
    (kit / "SHA256SUMS.sig").write_bytes(sign(key, KIND, sums))
    path = kit / "site.toml"
    path.write_text(path.read_text().replace('# folder = "/data/images"', 'folder = "images"'))
    with pytest.raises(ConfigError, match="which is no file of a kit"):
        check_kit(read_site(path), path)
