"""What people at a site agreed to, and took back: a file that only grows, and the protocols that wait for one of them.

    WORK/approvals.jsonl           a line each time: when, who, what; of an approval also what was read
    WORK/waiting/<digest>.json     a protocol that was asked for and not approved

What a person said last about a digest counts; then `approved` in site.toml, then its [approve].
"""

import json
import os
import pwd
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from wardround.config import FederationConfig, Protocol, SiteConfig, Strict, named, parse, read_federation
from wardround.config.privacy import SitePrivacyConfig
from wardround.config.site import ApproveConfig
from wardround.errors import ConfigError, WardroundError
from wardround.plan import resolve
from wardround.registry.durable import write_file
from wardround.registry.source import release_folder

BY_DIGEST = "approve by digest, once the federation has asked: 'wardround site approve SITE_TOML' lists what waits"
_MOST_WAITING = 20
_LARGEST = 64_000  # characters of a protocol's text; ours have some 3,000
_SHORTEST = 8  # digits that a digest may be given by


class Word(Strict):
    """One line of the file."""

    time: str  # UTC
    who: str
    said: Literal["approved", "withdrawn", "by rule"]  # by rule: a note, which decides nothing
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    federation: str
    protocol: dict[str, Any] | None = None  # what was approved, to be read again


def unapproved(site: SiteConfig, protocol: Protocol) -> str | None:
    """Return why a protocol may not run here, or None where it may. Raises ConfigError where the file is damaged."""
    digest, heard = protocol.digest(), words(site.work)
    if (last := _last(heard, digest)) is not None:
        return None if last.said == "approved" else "was approved here once, which was taken back"
    if digest in site.approved:
        return None
    if site.approve is None:
        return "is not approved here"
    beyond = _beyond(site.approve, protocol) or _beside(site.approve, protocol, heard)
    return beyond and f"is not approved here, and lies beyond [approve] in site.toml by its {beyond}"


def note_rule(site: SiteConfig, protocol: Protocol) -> None:
    """Write down, once, that a protocol begins to run which [approve] in site.toml alone approved."""
    digest = protocol.digest()
    if digest not in site.approved and not any(word.digest == digest for word in words(site.work)):
        _append(site.work, protocol, "by rule", "[approve] in site.toml")


def _beyond(rule: ApproveConfig, protocol: Protocol) -> str | None:
    """Return the first key by which a protocol is more than a rule allows, or None."""
    privacy, training = protocol.privacy, protocol.training
    if protocol.method.name not in rule.methods:
        return f"[method] name = '{protocol.method.name}'"
    if training.rounds > rule.rounds:
        return f"[training] rounds = {training.rounds}"
    if privacy.unit not in rule.units:
        return f"[privacy] unit = '{privacy.unit}'"
    if privacy.unit == "none":
        return None
    assert rule.epsilon is not None, "the rule has been checked"
    if privacy.epsilon > rule.epsilon:
        return f"[privacy] epsilon = {privacy.epsilon}"
    return f"[privacy] delta = {privacy.delta}" if privacy.delta > rule.delta else None


def _beside(rule: ApproveConfig, protocol: Protocol, heard: Sequence[Word]) -> str | None:
    """Return by what a site unit's protocol is too much beside those that the rule let run before, or None.

    No ledger counts a site's unit, and another seed is another protocol. Epsilons and deltas add up (Dwork and Roth
    2014, theorem 3.16).
    """
    if not isinstance(protocol.privacy, SitePrivacyConfig):
        return None
    if protocol.privacy.noise == "server":
        return "[privacy] noise = 'server': the coordinator would get updates without noise"
    ran = {word.digest: word.protocol["privacy"] for word in heard if word.said == "by rule" and word.protocol}
    earlier = [privacy for digest, privacy in ran.items() if privacy["unit"] == "site" and digest != protocol.digest()]
    assert rule.epsilon is not None, "the rule has been checked"
    for name, ceiling in (("epsilon", rule.epsilon), ("delta", rule.delta)):
        before, here = sum(privacy[name] for privacy in earlier), getattr(protocol.privacy, name)
        if before + here > ceiling:
            return f"[privacy] {name} = {here}, beside {before:g} of federations that it let run before"
    return None


def approve(site: SiteConfig, protocol: Protocol, who: str | None = None) -> None:
    """Write down that a person agrees to a protocol; it waits no longer. who: by default this account's name."""
    _append(site.work, protocol, "approved", who or _account())
    _file(site.work, protocol).unlink(missing_ok=True)


def withdraw(site: SiteConfig, reference: str, who: str | None = None) -> str:
    """Write down that an approval is taken back, however it was given; return the digest.

    reference: a digest, its beginning, or a federation's file. Raises ConfigError for one that would not run here.
    """
    given = approved(site)
    wanted = _of_file(reference).digest() if reference.endswith(".toml") else reference
    digest = _one(wanted, given, "is approved here")
    _append(site.work, (digest, given[digest]), "withdrawn", who or _account())
    return digest


def approved(site: SiteConfig) -> dict[str, str]:
    """Return what a person agreed to and did not take back, what site.toml lists, and what its rule let run and would.

    Federations by digest.
    """
    heard = words(site.work)
    known = dict.fromkeys(site.approved, "") | {word.digest: word.federation for word in heard}
    by_rule = {word.digest: word.protocol for word in heard if word.said == "by rule"}

    def runs(digest: str) -> bool:
        if (last := _last(heard, digest)) is not None:
            return last.said == "approved"
        if digest in site.approved:
            return True
        if (noted := by_rule.get(digest)) is None:
            return False
        try:
            return unapproved(site, parse(noted, Protocol, "a protocol that ran by rule")) is None
        except ConfigError:  # of another release, and this one would not run it
            return False

    return {digest: name for digest, name in known.items() if runs(digest)}


def out_of_reach(config: FederationConfig) -> str | None:
    """Return why a federation's initial weights cannot be had here, or None: a digest is of their hash, too."""
    if config.initial_weights is None:
        return None
    try:
        with release_folder(config.initial_weights):
            return None
    except WardroundError as error:
        return str(error)


def find(site: SiteConfig, reference: str) -> Protocol:
    """Return a federation file's protocol, or that of a digest, or its beginning, that waits or was approved once.

    Raises ConfigError where there is none.
    """
    if reference.endswith(".toml"):
        return _of_file(reference)
    read = {word.digest: word.protocol for word in words(site.work) if word.protocol is not None}
    known: dict[str, Mapping[str, Any]] = read | {one.digest(): one.model_dump(mode="json") for one in waiting(site)}
    return parse(dict(known[_one(reference, known, "waits here")]), Protocol, "the protocol that was approved")


def lines(site: SiteConfig) -> list[str]:
    """Return what waits and what was said last of each other protocol, to be printed."""
    heard = words(site.work)
    said = dict.fromkeys(site.approved, "approved in site.toml")
    said |= {word.digest: f"'{word.federation}': {word.said} at {word.time}, by {word.who}" for word in heard}
    said |= {one.digest(): f"'{one.name}': waits for approval" for one in waiting(site)}
    return [f"{digest[:12]}  {text}" for digest, text in said.items()] or ["no protocol was asked for or approved yet"]


def waiting(site: SiteConfig) -> list[Protocol]:
    """Return what was asked for and not approved, the last first; texts that this release cannot read are left out."""
    found = []
    for path in sorted((site.work / "waiting").glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found.append(parse(json.loads(path.read_bytes()), Protocol, str(path)))
        except (ConfigError, ValueError):
            continue
    return found


def keep_waiting(site: SiteConfig, protocol: Protocol) -> None:
    """Keep a protocol's text for a person to read; of more than twenty, those that were asked for last."""
    path, text = _file(site.work, protocol), protocol.model_dump_json()
    if len(text) > _LARGEST:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(path, text.encode())
    kept = sorted(path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for old in kept[:-_MOST_WAITING]:
        old.unlink()


def words(work: Path) -> list[Word]:
    """Return all that was said, oldest first. Raises ConfigError where a line is damaged."""
    path = work / "approvals.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(json.loads(line), Word, str(path)))
        except (ConfigError, ValueError) as error:
            raise ConfigError(
                f"{path}: line {number} is no approval; remove it, and approve or withdraw again what it was about."
            ) from error
    return found


def _last(heard: Sequence[Word], digest: str) -> Word | None:
    """Return what a person said last of a digest."""
    return next((word for word in reversed(heard) if word.digest == digest and word.said != "by rule"), None)


def _append(work: Path, about: Protocol | tuple[str, str], said: str, who: str) -> None:
    """Add a line, on disk when this returns."""
    line: dict[str, Any] = {"time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "who": who, "said": said}
    if isinstance(about, Protocol):
        line |= {"digest": about.digest(), "federation": about.name, "protocol": about.model_dump(mode="json")}
    else:
        line |= {"digest": about[0], "federation": about[1]}
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(work / "approvals.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _one(reference: str, known: Mapping[str, Any], holds: str) -> str:
    """Return the one digest that begins with a reference. Raises ConfigError where there is none, or several."""
    found = [digest for digest in known if digest.startswith(reference)] if len(reference) >= _SHORTEST else []
    if len(found) != 1:
        among = ", ".join(sorted(digest[:12] for digest in known)) or "none"
        raise ConfigError(
            f"'{reference}': no protocol with a digest that begins so {holds} ({among}); give its first {_SHORTEST} "
            "digits or more, or the federation's file."
        )
    return found[0]


def _of_file(path: str) -> Protocol:
    config = read_federation(Path(path))
    with named(Path(path)):
        if (why := out_of_reach(config)) is not None:
            raise ConfigError(f"{path}: initial_weights: {why} Or {BY_DIGEST}.")
        return resolve(config).protocol


def _file(work: Path, protocol: Protocol) -> Path:
    return work / "waiting" / f"{protocol.digest()}.json"


def _account() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's account may have no name
        return f"account {os.getuid()}"
