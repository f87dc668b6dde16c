"""Who becomes the champion: the gate that travels with each release, and the way back.

The gate is against mistakes. Whoever may write to MLflow may point its aliases anywhere; against them stands the
signature, which only the coordinator's key makes and every user can pin.

A version's tag `wardround.champion.NNNN` says who made it the champion, when and why; NNNN counts on over all
versions of a name, and so the chain of champions is read.
"""

import getpass
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wardround.errors import CheckpointError, ConfigError, ReleaseRefusal
from wardround.registry import release, signing
from wardround.registry.mlflow_store import ModelRow, Store
from wardround.update import collapsed, printable

CHAMPION = "champion"
_EVENT = "champion."
_NEEDED = ("round", "sites", "gate", "evaluation", "features", "differential_privacy", "protocol_digest", "software")


@dataclass(frozen=True)
class Condition:
    """One condition of the gate; `found` is text, or epsilon by site."""

    what: str
    found: str | dict[str, float]
    expected: str
    met: bool


@dataclass(frozen=True)
class Examined:
    """A version before the gate."""

    name: str
    version: str
    champion: str | None  # the version that is the champion now
    conditions: tuple[Condition, ...]


def promote(
    store: Store, reference: str, by: str, why: str, trust: str | None, show: Callable[[Examined], None]
) -> Examined:
    """Make a version the champion if it passes its gate; `show` gets what was found before anything is changed.

    Raises ReleaseRefusal where a condition is not met, ConfigError for a reference that names nothing, CheckpointError
    for files that were altered or that have no lineage; then nothing is changed.
    """
    record = _record(by, why)
    examined = examine(store, reference, trust)
    show(examined)
    if failed := [one.what for one in examined.conditions if not one.met]:
        raise ReleaseRefusal(
            f"model '{examined.name}/{examined.version}': is not promoted, its {' and '.join(failed)} not being as "
            "expected; nothing was changed."
        )
    _crown(store, examined.name, examined.version, {**record, "was": examined.champion, "by_way_of": "promote"})
    return examined


def rollback(store: Store, name: str, by: str, why: str, trust: str | None) -> tuple[str, str]:
    """Make the former champion the champion again, its files verified; return (version, the one before)."""
    record = _record(by, why)
    _, current = store.resolve(f"{name}@{CHAMPION}")
    *_, former, _ = [None, *champions(store.models(name), current)]
    if former is None:
        raise ConfigError(f"model '{name}': version {current} is the first champion; there is none to go back to.")
    _pulled_lineage(store, f"{name}/{former}", trust)
    _crown(store, name, former, {**record, "was": current, "by_way_of": "rollback"})
    return former, current


def champions(rows: Sequence[ModelRow], current: str) -> list[str]:
    """Return the versions of a name that were champion one after the other, without those that were rolled back.

    The last is `current`, the champion now, whoever made it that.
    """
    events = sorted(
        (int(key.removeprefix(_EVENT)), row.version, json.loads(value)["by_way_of"])
        for row in rows
        for key, value in row.tags.items()
        if key.startswith(_EVENT)
    )
    line: list[str] = []
    for _, version, way in events:
        line = _back_to(line, version) if way == "rollback" or line[-1:] == [version] else [*line, version]
    return _back_to(line, current)


def _back_to(line: list[str], version: str) -> list[str]:
    """Return a line of champions up to the last time that a version was it; with it at the end where it never was."""
    return line[: len(line) - line[::-1].index(version)] if version in line else [*line, version]


def examine(store: Store, reference: str, trust: str | None) -> Examined:
    """Return what the gate finds of a version. Its files are downloaded and compared; nothing is changed."""
    name, version = store.resolve(reference)
    champion = next((row for row in store.models(name) if CHAMPION in row.aliases), None)
    if champion and champion.version == version:
        raise ConfigError(f"model '{name}/{version}': is the champion already.")
    said, signer, count = _pulled_lineage(store, f"{name}/{version}", trust)
    files = Condition("files", f"{count}, each with its hash", "the hashes that were registered and signed", met=True)
    try:
        measured = (_probe(said, store, champion), _features(said), _epsilon(said))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"model '{name}/{version}': its lineage is not as this Wardround writes it: {error}; register "
            "its round anew."
        ) from error
    conditions = (files, _signature(signer, trust, champion), *measured)
    return Examined(name, version, champion.version if champion else None, conditions)


def _signature(signer: str | None, trust: str | None, champion: ModelRow | None) -> Condition:
    """Whose key: a pinned one, which the download has compared; else the champion's, where there is one."""
    what, found = "signature", signer or "none"
    if signing.pins(trust):
        return Condition(what, found, "pinned", met=True)
    if champion is None:
        return Condition(what, found, "any: none is pinned, and there is no champion", signer is not None)
    known = champion.tags.get("signed_by", "none")
    return Condition(what, found, f"the champion's, {known}; or pin another by --trust", signer == known)


def _probe(said: Mapping[str, Any], store: Store, champion: ModelRow | None) -> Condition:
    """The linear probe, not worse than the champion's by more than the tolerance, on the same evaluation set."""
    what, now = "probe", said["evaluation"]
    if "missing" in now:
        return Condition(what, f"not measured: {now['missing']}", "a linear probe", met=False)
    score = now["probes"]["linear"]["backbone"]
    floors = ", ".join(f"{arm} {value:.3f}" for arm, value in now["probes"]["linear"].items() if arm != "backbone")
    found = "; ".join([f"{score:.3f} ({floors})", *now.get("doubts", ())])
    if champion is None:
        return Condition(what, found, "any: there is no champion", met=True)
    if json.loads(champion.tags["files"])[release.WEIGHTS] == said["sha256"][release.WEIGHTS]:
        return Condition(what, found, "any: these are the champion's own weights", met=True)
    provenance = store.read(f"{champion.name}/{champion.version}", release.PROVENANCE)
    then = json.loads(provenance).get("evaluation", {})
    if then.get("set") != now["set"]:
        expected = "on the set that the champion was measured on; register the champion's round anew with this one's"
        return Condition(what, f"{found}, on another set", expected, met=False)
    best, tolerance = then["probes"]["linear"]["backbone"], said["gate"]["tolerance"]
    expected = f"at least {best - tolerance:.3f}: the champion's {best:.3f} less the tolerance {tolerance:g}"
    return Condition(what, found, expected, score >= best - tolerance)


def _features(said: Mapping[str, Any]) -> Condition:
    found = said["features"]
    if "missing" in found:
        return Condition("features", f"not measured: {found['missing']}", "no collapse", met=False)
    rank, spread = found["effective_rank"], found["feature_spread"]
    shown = f"effective rank {rank:.1f}, spread {spread:.3f}"
    return Condition("features", shown, "no collapse", not collapsed(rank, spread))


def _epsilon(said: Mapping[str, Any]) -> Condition:
    """Every site's epsilon, or with a site as unit the federation's, within the ceiling."""
    what, ceiling, promised = "epsilon", said["gate"]["epsilon"], said["differential_privacy"]
    if not isinstance(promised, Mapping):
        expected = "none is promised" if ceiling is None else f"at most {ceiling:g}"
        return Condition(what, "no differential privacy", expected, ceiling is None)
    spent = promised["epsilon"]
    by_site = dict(spent) if isinstance(spent, Mapping) else {"every site": spent}
    expected = f"at most {ceiling:g} at each site, {promised['adjacency']}, delta {promised['delta']:g}"
    return Condition(what, by_site, expected, ceiling is not None and max(by_site.values(), default=0.0) <= ceiling)


def _pulled_lineage(store: Store, reference: str, trust: str | None) -> tuple[dict[str, Any], str | None, int]:
    """Return a version's lineage, signer and number of files, all of them downloaded and verified."""
    with TemporaryDirectory() as aside:
        folder = store.pull(reference, Path(aside) / "release", trust)
        path = folder / release.PROVENANCE
        block = path.read_bytes() if path.exists() else b"{}"
        return _lineage(block, reference), release.signer(folder), len(release.file_hashes(folder))


def _lineage(block: bytes, reference: str) -> dict[str, Any]:
    """Return the lineage in a provenance. Raises CheckpointError where it lacks any."""
    said: dict[str, Any] = json.loads(block)
    if missing := [name for name in _NEEDED if name not in said]:
        raise CheckpointError(
            f"model '{reference}': has no lineage ('{missing[0]}' is missing in its provenance.json), so nothing can "
            "be compared; register its round with 'wardround register'."
        )
    return said


def _record(by: str, why: str) -> dict[str, str]:
    """Return who, when and why, as it is kept. Raises ConfigError for what says nothing."""
    by = by or getpass.getuser()
    for name, text in (("by", by), ("why", why)):
        if not text.strip() or text != printable(text) or len(text) > 500:
            raise ConfigError(
                f"--{name} '{printable(text)[:40]}': expected a line of at most 500 letters that says it."
            )
    return {"by": by, "when": datetime.now(UTC).isoformat(timespec="seconds"), "why": why}


def _crown(store: Store, name: str, version: str, record: Mapping[str, Any]) -> None:
    """Write down who becomes champion and why, then make it so: a kill in between leaves the champion of before."""
    events = [key for row in store.models(name) for key in row.tags if key.startswith(_EVENT)]
    number = 1 + max((int(key.removeprefix(_EVENT)) for key in events), default=0)
    store.promote(name, version, CHAMPION, {f"{_EVENT}{number:04d}": json.dumps(record, sort_keys=True)})
