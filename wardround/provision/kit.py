"""The kits: what each site receives, and how sites join, leave and change their key.

    out/<site>/   ca.crt coordinator.pub site.pub site.toml compose.yaml README.md SHA256SUMS SHA256SUMS.sig
                  site.key   unless the site made its key itself

Nothing that exists is written over, so a second run adds what is missing. A kit that was handed over and
removed here stays so: the signed membership says that it was made.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from wardround import __version__
from wardround.client.kit import KIND, SIGNATURE, SUMS, UNSIGNED
from wardround.config import FederationConfig
from wardround.errors import ConfigError
from wardround.provision import keys, request
from wardround.provision.coordinator import begin, folder, known, owner_of, seal, sign
from wardround.registry.durable import private_folder, write_file
from wardround.registry.signing import KEY, release_key
from wardround.server.membership import Membership, check_declared, public_key, signing_key
from wardround.signatures import fingerprint
from wardround.signatures import sign as signed

_TEMPLATES = ("site.toml", "compose.yaml", "README.md")


def provision(config: FederationConfig, out: Path, sites: Sequence[str] = (), address: str | None = None) -> Membership:
    """Make the coordinator's folder and a kit for each site; sign who they are.

    Without `sites`, the names of [membership] are taken, and where it has none those that were added; who was
    revoked is left out. Raises ConfigError where a name, the address, a declared number or a file that exists does
    not fit.
    """
    names = _names(config, sites)
    check_declared(config, names)
    before, after = begin(config, out, address)
    for site in names or after.keys:
        if site not in after.gone and (site not in after.keys or (out / site).exists()):
            after = _join(config, out, after, site)
    return seal(config, out, before, after)


def add(out: Path, site: str) -> Path:
    """Make one site's kit and return its folder; who was revoked comes back so, with a new key."""
    config, membership = known(out)
    _names(config, [site])
    if site in membership.keys:
        raise ConfigError(f"site '{site}': takes part already; 'wardround provision rotate {site}' gives it a new key.")
    sign(config, out, membership, _join(config, out, membership, site))
    return out / site


def answer(out: Path, path: Path) -> Path:
    """Make the kit of a site that made its key itself, from its request; return its folder."""
    config, membership = known(out)
    site, key = request.read(path)
    _names(config, [site])
    line = membership.keys.get(site)
    if line is not None and public_key(line) != key:
        raise ConfigError(
            f"{path}: site '{site}' takes part with another key, {fingerprint(public_key(line))}; where it asked for "
            f"a new one, 'wardround provision rotate {path}'."
        )
    sign(config, out, membership, _join(config, out, membership, site, key))
    return out / site


def revoke(out: Path, site: str) -> Membership:
    """Take a site's key back, for good."""
    config, membership = known(out)
    return sign(config, out, membership, _without(membership, site))


def rotate(out: Path, who: str) -> Path:
    """Give a site another key: one made here, for its name; that of a request, for its file. Return the new kit."""
    config, membership = known(out)
    site, key = request.read(Path(who)) if Path(who).suffix == ".csr" else (who, None)
    without = _without(membership, site)
    if key is not None and public_key(membership.keys[site]) == key:
        raise ConfigError(f"{who}: has the key that site '{site}' has already; let it make another one first.")
    if (out / site).exists():
        raise ConfigError(f"{out / site}: is the kit with the key of before; move it away first.")
    sign(config, out, membership, _join(config, out, without, site, key))
    return out / site


def lines(out: Path) -> list[str]:
    """Return what a person wants to see of a membership: whose key is which, and where the kits are."""
    _, membership = known(out)
    own = fingerprint(signing_key(folder(out)).public_key())
    found = [f"membership {membership.version} of '{membership.federation}', signed by {own}"]
    for site, line in sorted(membership.keys.items()):
        kit = f"kit in {out / site}" if (out / site).exists() else "its kit was handed over"
        toml = out / site / "site.toml"
        if toml.exists() and f'"{membership.address}"' not in toml.read_text():
            kit += f", whose site.toml names another address than {membership.address}: change it there"
        listed = "" if site in membership.active else "; not in [membership] sites, so it is not asked"
        found.append(f"  {site}: {fingerprint(public_key(line))}; {kit}{listed}")
    found += [f"  {site}: revoked" for site in sorted(membership.gone)]
    released = fingerprint(release_key(folder(out) / KEY).public_key())
    return [*found, f"releases are signed by {released}; downstream teams pin it"]


def _names(config: FederationConfig, sites: Sequence[str]) -> list[str]:
    """Return the sites that are named, here or in the file, every name checked: they become folders."""
    names = list(dict.fromkeys(sites or config.membership.sites))
    for name in map(keys.check_name, names):
        if config.membership.sites and name not in config.membership.sites:
            raise ConfigError(
                f"site '{name}' is not in [membership] sites of federation '{config.name}'; add it there, and sign "
                "that: 'wardround provision FEDERATION.toml --keys-at-sites'."
            )
    return names


def _join(
    config: FederationConfig, out: Path, membership: Membership, site: str, key: EllipticCurvePublicKey | None = None
) -> Membership:
    """Make what is missing of a site's kit; return the membership with it, to be signed.

    `key` is the site's own, where it has one.
    """
    home, given = out / site, membership.keys.get(site)
    check_declared(config, {*membership.active, site})
    private_folder(home)
    if key is None and given is not None and not (home / "site.key").exists():
        key = public_key(given)  # made at the site
    own = key or keys.site_key(home / "site.key").public_key()
    line = keys.public_line(own, site)
    if given is not None and public_key(given) != own:
        raise ConfigError(f"{home / 'site.key'}: is not the key that was signed for '{site}'; put the right one back.")
    if (other := owner_of(membership, line)) not in (None, site):
        raise ConfigError(f"site '{site}': has the key of site '{other}'; let it make its own.")
    if fingerprint(own) in membership.revoked:
        raise ConfigError(
            f"site '{site}': its key {fingerprint(own)} was revoked, and is never let in again; move {home} away, or "
            "let the site make another."
        )
    _write(config, out, membership.address, site, line)
    return membership.model_copy(update={"keys": {**membership.keys, site: line}})


def _write(config: FederationConfig, out: Path, address: str, site: str, line: str) -> None:
    """Write a kit's files that are not there; the checksums come last and say that it is whole."""
    home, coordinator = out / site, folder(out)
    names = {"site": site, "federation": config.name, "address": address, "version": __version__}
    blocks = {
        "ca.crt": (coordinator / "ca.crt").read_bytes(),
        "coordinator.pub": keys.public_pem(signing_key(coordinator)),
        "site.pub": f"{line}\n".encode(),
        **{name: _fill(name, names) for name in _TEMPLATES},
    }
    missing = [name for name in blocks if not (home / name).exists()]
    for name in missing:
        write_file(home / name, blocks[name])
    if missing or not (home / SIGNATURE).exists():
        listed = sorted(home / name for name in blocks if name not in UNSIGNED)
        sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in listed).encode()
        write_file(home / SUMS, sums)
        write_file(home / SIGNATURE, signed(signing_key(coordinator), KIND, sums))


def _without(membership: Membership, site: str) -> Membership:
    """Return a membership in which a site's key is taken back."""
    if site not in membership.keys:
        raise ConfigError(f"site '{site}': has no key; sites with one: {', '.join(sorted(membership.keys)) or 'none'}.")
    left = {name: line for name, line in membership.keys.items() if name != site}
    revoked = {**membership.revoked, fingerprint(public_key(membership.keys[site])): site}
    return membership.model_copy(update={"keys": left, "revoked": revoked})


def _fill(template: str, names: dict[str, str]) -> bytes:
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(names).encode()
