"""Who takes part: a file that the coordinator signs, apart from what sites approve.

    KIT/membership.json   signed; the commands of `wardround provision` write it
    RUN/members.json      what a run took over from it, between two rounds

It holds [membership] of the federation's file and each site's public key. Its version only goes up, so that
an older copy does not let in again who was revoked since.
"""

import base64
import binascii
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from pydantic import Field

from wardround.config import FederationConfig, parse
from wardround.config.membership import MembershipConfig
from wardround.config.privacy import SitePrivacyConfig, UnitPrivacyConfig
from wardround.config.strict import Name, Strict
from wardround.errors import CheckpointError, ConfigError
from wardround.registry.durable import write_file
from wardround.signatures import is_signed, sign

FILE = "membership.json"
_KIND = "wardround membership"  # what the signature is of


class Membership(Strict):
    """One version of a federation's membership, as the coordinator signed it."""

    format: Literal[1] = 1
    federation: Name
    version: int = Field(ge=1)
    address: str  # host:port that sites connect to
    settings: MembershipConfig  # [membership] of the federation's file
    keys: dict[Name, str]  # site -> public key, a line of OpenSSH; of all that are known and not revoked
    revoked: dict[str, Name] = Field(default={})  # fingerprint of a key that is never let in again -> its site

    @property
    def gone(self) -> set[str]:
        """The sites that were revoked and did not come back with another key."""
        return set(self.revoked.values()) - self.keys.keys()

    @property
    def active(self) -> dict[str, str]:
        """The keys of the sites that take part: those that [membership] lists, or all where it lists none."""
        return {site: key for site, key in self.keys.items() if site in (self.settings.sites or self.keys)}


class Members(Strict):
    """Who takes part in a run, and on which terms; in one file, so that a kill leaves all or nothing of it."""

    version: int = 0  # of the membership that it was taken over from; 0 where all sites run in one process
    settings: MembershipConfig
    keys: dict[Name, str]  # site -> public key (PEM)


def read_members(path: Path) -> Members:
    """Return a run's members. Raises CheckpointError where the file is damaged."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read; the run folder is damaged. Restore it from a copy.") from error
    return parse(raw, Members, str(path))


def write_members(path: Path, members: Members) -> None:
    """Write a run's members: from here on they hold."""
    write_file(path, members.model_dump_json(indent=1).encode())


def read_membership(kit: Path) -> Membership:
    """Return what the coordinator's folder says of its sites.

    Raises ConfigError where it is missing, or is not what the folder's own key signed.
    """
    path = kit / FILE
    try:
        raw = json.loads(path.read_bytes())
        signature = base64.b64decode(raw.pop("signature"), validate=True)
    except OSError as error:
        raise ConfigError(f"{kit}: has no {FILE}; make it with 'wardround provision'.") from error
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ConfigError(f"{path}: is no signed membership; put the original back.") from error
    if not is_signed(signing_key(kit).public_key(), signature, _KIND, _canonical(raw)):
        raise ConfigError(
            f"{path}: is not what the coordinator's signing.key signed; put the original back, and change it by the "
            "commands of 'wardround provision' alone."
        )
    return parse(raw, Membership, str(path))


def write_membership(kit: Path, membership: Membership) -> None:
    """Sign a version and put it in the place of the one before, in one step."""
    raw = membership.model_dump(mode="json")
    signature = base64.b64encode(sign(signing_key(kit), _KIND, _canonical(raw))).decode()
    write_file(kit / FILE, json.dumps({**raw, "signature": signature}, indent=1).encode() + b"\n")


def signing_key(kit: Path) -> EllipticCurvePrivateKey:
    """Return the coordinator's key. Raises ConfigError where the folder is not the coordinator's."""
    path = kit / "signing.key"
    if not path.is_file():
        raise ConfigError(f"{kit}: has no signing.key; name the 'coordinator' folder of 'wardround provision'.")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no private key; put the original back.") from error
    assert isinstance(key, EllipticCurvePrivateKey), "provision makes no other"
    return key


def members_of(kit: Path, config: FederationConfig) -> Members:
    """Return who takes part in a federation that is started now.

    Raises ConfigError where the signed membership is another federation's, lacks a site's key, or says
    something else than [membership] of the config.
    """
    signed = read_membership(kit)
    if signed.federation != config.name:
        raise ConfigError(f"{kit}: is of federation '{signed.federation}', expected '{config.name}'; name its own kit.")
    remedy = f"'wardround provision FEDERATION.toml --out {kit.parent}'"
    if missing := sorted(config.membership.sites.keys() - signed.keys.keys() - signed.gone):
        raise ConfigError(f"{kit}: has no key of site '{missing[0]}'; make its kit with {remedy}.")
    if signed.settings != config.membership:
        key = next(k for k in MembershipConfig.model_fields if _differ(signed.settings, config.membership, k))
        raise ConfigError(
            f"[membership] {key} = {getattr(config.membership, key)}: {kit / FILE} was signed with "
            f"{getattr(signed.settings, key)}; sign the change with {remedy}."
        )
    if not signed.active:
        raise ConfigError(
            f"{kit}: has no site's key; make each kit with 'wardround provision add SITE --out {kit.parent}'."
        )
    return taken_over(signed)


def taken_over(signed: Membership) -> Members:
    """Return a signed membership as a run keeps it."""
    keys = {site: pem(line) for site, line in sorted(signed.active.items())}
    return Members(version=signed.version, settings=signed.settings, keys=keys)


def check_declared(config: FederationConfig, members: Collection[str]) -> None:
    """Raise ConfigError where declared numbers do not carry the privacy that is promised to these members."""
    privacy, units = config.privacy, config.membership.units
    if isinstance(privacy, UnitPrivacyConfig) and (missing := sorted(set(members) - units.keys())):
        raise ConfigError(
            f"[membership] units: no declared number of {privacy.unit}s for '{missing[0]}'; add one, a round number "
            "below the true one."
        )
    if isinstance(privacy, SitePrivacyConfig) and len(members) > privacy.cohort:
        raise ConfigError(f"[privacy] cohort = {privacy.cohort}: there are {len(members)} sites; declare them all.")


def pem(line: str) -> str:
    """Return an OpenSSH public key as SuperLink names a node by it."""
    return public_key(line).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_key(line: str) -> EllipticCurvePublicKey:
    """Return the key in a line of OpenSSH. Raises ConfigError."""
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"'{line[:40]}': is no public key; put the original back.") from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise ConfigError(f"'{line[:40]}': is no key of ECDSA P-384; make it with 'wardround site init'.")
    return key


def _differ(one: MembershipConfig, other: MembershipConfig, key: str) -> bool:
    return bool(getattr(one, key) != getattr(other, key))


def _canonical(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
