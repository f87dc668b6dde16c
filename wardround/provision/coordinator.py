"""The coordinator's own folder: made once, kept, and asked by every command that comes after.

    out/coordinator/   ca.crt ca.key server.crt server.key signing.key release.key federation.json membership.json

Nothing that exists is written over but the last two, which say what the federation's file said last, and
`server.crt` where it is renewed on request.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.provision import certificates, keys
from wardround.registry.durable import private_folder, write_file
from wardround.registry.signing import KEY, release_key
from wardround.server.membership import FILE, Membership, check_declared, read_membership, write_membership
from wardround.signatures import certificate_names

_PORT = 8500
# SuperLink's own processes on the coordinator's machine speak TLS to it by these names.
_LOOPBACK = ("localhost", "127.0.0.1")


def folder(out: Path) -> Path:
    """Return the coordinator's folder among the kits."""
    return out / "coordinator"


def prepare(config: FederationConfig, out: Path, address: str | None = None) -> Membership:
    """Make what is missing of the coordinator's folder; return the membership that is signed by now.

    `address` is what sites connect to: unless given, that of the last call, or the first of [membership]
    server_names. Raises ConfigError where it, or a file that exists, does not fit.
    """
    return seal(config, out, *begin(config, out, address))


def begin(config: FederationConfig, out: Path, address: str | None) -> tuple[Membership | None, Membership]:
    """Make what a kit is made from; return the membership that is signed, if any, and the next, not signed yet."""
    home = folder(out)
    _check_readable(home)
    before = read_membership(home) if (home / FILE).exists() else None
    if before is not None and before.federation != config.name:
        raise ConfigError(f"{home}: is of federation '{before.federation}', not '{config.name}'; give another --out.")
    address = address or (before.address if before else f"{config.membership.server_names[0]}:{_PORT}")
    hosts = _hosts(config, address)
    private_folder(home)
    _certify(config.name, home, hosts)
    keys.tls_key(home / "signing.key")
    release_key(home / KEY)
    first = Membership(federation=config.name, version=1, address="", settings=config.membership, keys={})
    return before, (before or first).model_copy(update={"address": address, "settings": config.membership})


def seal(config: FederationConfig, out: Path, before: Membership | None, after: Membership) -> Membership:
    """Sign a membership with all the sites that joined, as one version; from here on it holds."""
    membership = sign(config, out, before, after)
    write_file(folder(out) / "federation.json", config.model_dump_json(indent=1).encode())
    return membership


def known(out: Path) -> tuple[FederationConfig, Membership]:
    """Return the federation's config and membership as they were signed last. Raises ConfigError without any."""
    home = folder(out)
    _check_readable(home)
    path = home / "federation.json"
    if not path.is_file():
        raise ConfigError(f"{out}: has no coordinator's folder; begin with 'wardround provision FEDERATION.toml'.")
    membership = read_membership(home)
    config = FederationConfig.model_validate_json(path.read_bytes())
    return config.model_copy(update={"membership": membership.settings}), membership


def sign(config: FederationConfig, out: Path, before: Membership | None, after: Membership) -> Membership:
    """Sign what comes after a membership as its next version, if anything has changed, and return it.

    Raises ConfigError where declared numbers do not carry the privacy that is promised to its sites.
    """
    after = after.model_copy(update={"settings": config.membership})
    check_declared(config, after.active)
    if before is None or after != before:
        after = after.model_copy(update={"version": 1 if before is None else before.version + 1})
        write_membership(folder(out), after)
    return after


def renew(out: Path) -> Path:
    """Replace the server's certificate by one for the same key, in one step; return its file."""
    config, membership = known(out)
    home = folder(out)
    _write_certificate(home, _hosts(config, membership.address))
    return home / "server.crt"


def owner_of(membership: Membership, line: str) -> str | None:
    """Return which site has a public key (a line of OpenSSH, whatever its comment)."""
    owners: Mapping[str, str] = {known.rsplit(" ", 1)[0]: site for site, known in membership.keys.items()}
    return owners.get(line.rsplit(" ", 1)[0])


def _check_readable(home: Path) -> None:
    """Raise ConfigError where this account may not read the coordinator's folder, as after its `chown` for a container.

    A file that `sudo` wrote may be another account's than the rest.
    """
    path = home
    try:
        for path in home.iterdir():
            if path.is_file():
                path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):  # not made yet, or being replaced
        return
    except PermissionError as error:
        raise ConfigError(
            f"{path}: account {os.geteuid()} may not read it; take the account that owns it, or sudo and then 'chown' "
            "what was written to that account."
        ) from error


def _certify(federation: str, home: Path, hosts: list[str]) -> None:
    server = home / "server.crt"
    if server.exists() and (missing := set(hosts) - certificate_names(server.read_bytes())):
        raise ConfigError(f"{server}: is not for {', '.join(sorted(missing))}; move it away, and a new one is issued.")
    ca, ca_key = home / "ca.crt", keys.tls_key(home / "ca.key")
    if not ca.exists():
        write_file(ca, certificates.authority(federation, ca_key))
    keys.tls_key(home / "server.key")
    if not server.exists():
        _write_certificate(home, hosts)


def _write_certificate(home: Path, hosts: list[str]) -> None:
    ca, ca_key, key = (home / "ca.crt").read_bytes(), keys.tls_key(home / "ca.key"), keys.tls_key(home / "server.key")
    write_file(home / "server.crt", certificates.server_certificate(ca, ca_key, key.public_key(), hosts))


def _hosts(config: FederationConfig, address: str) -> list[str]:
    """Return what the server's certificate is for; the address comes first."""
    found = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"address '{address}': expected host:port, such as federation.example.org:8500.")
    return list(dict.fromkeys([found[1].strip("[]"), *config.membership.server_names, *_LOOPBACK]))
