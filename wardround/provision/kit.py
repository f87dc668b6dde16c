"""What the coordinator keeps, and the kit that each site receives.

    out/coordinator/   ca.crt ca.key server.crt server.key signing.key membership.json keys/<site>.pub
    out/<site>/        ca.crt coordinator.pub site.key site.toml README.md

Nothing that exists is written over, so a second run with more names adds the missing sites. A kit
that was handed over and removed here stays so: its public key in `keys/` says that it was made.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from pydantic import TypeAdapter, ValidationError

from wardround.config import FederationConfig
from wardround.config.strict import Name
from wardround.errors import ConfigError
from wardround.provision import certificates, keys
from wardround.registry.durable import write_file

# SuperLink's own processes on the coordinator's machine speak TLS to it by these names.
_LOOPBACK = ("localhost", "127.0.0.1")


def provision(config: FederationConfig, out: Path, sites: Sequence[str], address: str = "localhost:8500") -> None:
    """Write the coordinator's folder and a kit for each site; `address` is what sites connect to.

    Without `sites`, the names of [membership] are taken. Raises ConfigError where a name, the
    address or a file that exists does not fit.
    """
    names = _names(config, sites)
    hosts = list(dict.fromkeys([_host(address), *config.membership.server_names, *_LOOPBACK]))
    coordinator = out / "coordinator"
    ca = _coordinator(config.name, coordinator, hosts)
    signing = keys.public_pem(keys.tls_key(coordinator / "signing.key"))
    for site in names:
        public = coordinator / "keys" / f"{site}.pub"
        if public.exists() and not (out / site).exists():
            continue  # its kit was handed over
        line = keys.public_line(keys.site_key(out / site / "site.key"), site)
        for path, block in (
            (out / site / "ca.crt", ca),
            (out / site / "coordinator.pub", signing),
            (out / site / "site.toml", _fill("site.toml", site, config.name, address)),
            (out / site / "README.md", _fill("README.md", site, config.name, address)),
            (public, line),  # last: it says that the kit is whole
        ):
            if not path.exists():
                write_file(path, block)
        if public.read_bytes() != line:
            raise ConfigError(f"{public}: is not the public key of {out / site / 'site.key'}; put the right one back.")
    _membership(config.name, coordinator, address)


def _names(config: FederationConfig, sites: Sequence[str]) -> list[str]:
    """Return the sites to make kits for, every name checked: they become folders."""
    names = list(dict.fromkeys(sites or config.membership.sites))
    if not names:
        raise ConfigError("no site is named; list them in the config's [membership] sites.")
    for name in names:
        if not _is_name(name) or name == "coordinator":
            raise ConfigError(
                f"'{name}' cannot name a site: expected letters, digits, '.', '_' and '-', not 'coordinator'."
            )
        if config.membership.sites and name not in config.membership.sites:
            raise ConfigError(
                f"site '{name}' is not in [membership] sites of federation '{config.name}'; add it there."
            )
    return names


def _is_name(name: str) -> bool:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        return False
    return True


def _host(address: str) -> str:
    """Return the host of host:port; an IPv6 address stands in brackets."""
    found = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"address '{address}': expected host:port, such as federation.example.org:8500.")
    return found[1].strip("[]")


def _coordinator(name: str, folder: Path, hosts: list[str]) -> bytes:
    """Make what is missing of the coordinator's folder; return the CA certificate."""
    server = folder / "server.crt"
    if server.exists() and (missing := set(hosts) - certificates.names_in(server.read_bytes())):
        raise ConfigError(f"{server}: is not for {', '.join(sorted(missing))}; move it away, and a new one is issued.")
    ca, ca_key = folder / "ca.crt", keys.tls_key(folder / "ca.key")
    if not ca.exists():
        write_file(ca, certificates.authority(name, ca_key))
    server_key = keys.tls_key(folder / "server.key")
    if not server.exists():
        write_file(server, certificates.server_certificate(ca.read_bytes(), ca_key, server_key.public_key(), hosts))
    return ca.read_bytes()


def _membership(name: str, folder: Path, address: str) -> None:
    """Write who has a kit, with the fingerprint of each public key as `sha256sum` prints it."""
    sites = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "keys").glob("*.pub"))
    }
    text = json.dumps({"format": 1, "federation": name, "address": address, "sites": sites}, indent=1)
    write_file(folder / "membership.json", text.encode() + b"\n")


def _fill(template: str, site: str, federation: str, address: str) -> bytes:
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(site=site, federation=federation, address=address).encode()
