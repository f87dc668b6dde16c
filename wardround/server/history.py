"""From a run folder to the plain values of its report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wardround.config.privacy import NoPrivacyConfig, SitePrivacyConfig, UnitPrivacyConfig
from wardround.errors import CheckpointError, ConfigError
from wardround.privacy import site_level
from wardround.registry import release
from wardround.registry.checkpoint import damaged, read_manifest
from wardround.report.history import History, Member, Promise, Round, SiteRound
from wardround.server.release import lineage_of
from wardround.server.run_folder import RunFolder
from wardround.server.tracking import audit_lines, collapse_lines, drift_lines, may_rise, metrics
from wardround.update import MEASURED, withholds

ALL = "all sites"
POINTS = 12  # of the curve of a whole site's epsilon: each takes a fifth of a second


def history_of(run: RunFolder) -> History:
    """Return what a run's committed rounds tell.

    Where a site is the privacy unit, what was measured on its images has no noise and is left out: a page is handed on.
    Raises ConfigError where no round is committed, CheckpointError where a record is damaged.
    """
    numbers = run.committed()[1:]
    if not numbers:
        raise ConfigError(f"{run.path}: has committed no round yet; there is nothing to report.")
    manifests = {number: read_manifest(run.round(number) / "checkpoint") for number in numbers}
    at = numbers[0]
    try:
        rounds = []
        for at in numbers:
            rounds.append(_round(run, at, manifests[at]))
        lineage = lineage_of(run, at)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = "its record lacks fields or holds other values than Wardround writes"
        raise CheckpointError(damaged(run.round(at) / "checkpoint", what)) from error
    return History(
        name=run.config.name,
        recipe=run.protocol,
        planned=run.config.training.rounds,
        rounds=tuple(rounds),
        members={site: _member(site, rounds, lineage["sites"]) for site in _sites(run, rounds)},
        withheld=withholds(run.config.privacy) or isinstance(run.config.privacy, SitePrivacyConfig),
        promise=_promise(run, lineage),
        warnings=tuple(_warnings(run)),
        provenance=_provenance(run, lineage, manifests[at]["record"]["versions"]),
        software=lineage["software"],
    )


def _record(run: RunFolder, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's record as a page may show it."""
    if not isinstance(run.config.privacy, SitePrivacyConfig):
        return dict(record)
    hidden = dict.fromkeys(MEASURED)
    return {**record, "sites": {site: {**one, **hidden} for site, one in record["sites"].items()}, "received": {}}


def _round(run: RunFolder, number: int, manifest: Mapping[str, Any]) -> Round:
    record = _record(run, manifest["record"])
    sites, received = record["sites"], record.get("received", {})
    found = {
        site: SiteRound(
            "counted", "", one["loss"], one["effective_rank"], one["seconds"], received.get(site)
        )
        for site, one in sites.items()
    }  # fmt: skip
    dropped = record.get("dropped", {})
    found |= {
        site: SiteRound("late" if site in dropped else "refused", str(why)) for site, why in record["refused"].items()
    }
    for site in record.get("training", {}):
        found.setdefault(site, SiteRound("training"))
    for site in run.members:
        found.setdefault(site, SiteRound("not asked"))
    told = metrics(record)
    sizes = (record["seconds"], record["bytes_sent"], record["bytes_received"])
    return Round(number, dict(sorted(found.items())), told.get("loss"), *sizes, manifest["state"])


def _sites(run: RunFolder, rounds: list[Round]) -> list[str]:
    """Return everybody who takes part, or did."""
    return sorted({*run.members, *(site for one in rounds for site in one.sites)})


def _member(site: str, rounds: list[Round], lineage: Mapping[str, Mapping[str, Any]]) -> Member:
    outcomes = [one.sites[site].outcome for one in rounds if site in one.sites]
    said = lineage.get(site, {})
    missed = outcomes.count("refused") + outcomes.count("late")
    counts = {name: said.get(name) for name in ("images", "patients", "units", "weight")}
    return Member(**counts, counted=outcomes.count("counted"), missed=missed)


def _promise(run: RunFolder, lineage: Mapping[str, Any]) -> Promise | None:
    privacy, held = run.config.privacy, lineage["differential_privacy"]
    if isinstance(privacy, NoPrivacyConfig):
        return None
    said = held["statement"]
    return Promise(
        unit=privacy.unit,
        adjacency=held["adjacency"],
        delta=privacy.delta,
        planned=privacy.epsilon,
        ceiling=lineage["gate"]["epsilon"],
        spent=_spent(run),
        statements=(said,) if isinstance(said, str) else tuple(said.values()),
    )


def _spent(run: RunFolder) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return epsilon after each round, by site; of a whole site as unit it is the same for all, and of some rounds."""
    privacy, numbers = run.config.privacy, run.committed()[1:]
    if isinstance(privacy, UnitPrivacyConfig):
        spent: dict[str, tuple[tuple[int, float], ...]] = {}
        for number in numbers:
            for site, one in run.record(number)["sites"].items():
                spent[site] = (*spent.get(site, ()), (number, one["epsilon"]))
        return spent
    assert isinstance(privacy, SitePrivacyConfig), "who has no privacy has spent nothing"
    shown = sorted({*numbers[:: -(-len(numbers) // POINTS)], numbers[-1]})
    total = run.config.training.rounds
    return {ALL: tuple((number, site_level.spent(privacy, total, number)) for number in shown)}


def _warnings(run: RunFolder) -> list[str]:
    """Return what the coordinator was warned of: the newest words of each, with the rounds they were said in."""
    said: dict[str, tuple[list[int], str]] = {}
    records = {number: _record(run, run.record(number))["sites"] for number in run.committed()[1:]}
    for number, sites in records.items():
        before = [records[earlier] for earlier in records if earlier < number]
        collapse = collapse_lines(sites, before, may_rise=may_rise(run, number))
        for line in (*collapse, *drift_lines(sites, before), *audit_lines(sites, before)):
            words = line.removeprefix("warning: ")
            kind = words.partition(" (")[0]  # what follows are the round's own figures
            said[kind] = ([*said.get(kind, ([], ""))[0], number], words)
    aside = sorted(path.name for path in (run.path / "rounds").glob("damaged-*"))
    damaged = [f"a checkpoint was damaged, set aside as {name}, and its round trained again" for name in aside]
    return [f"round {', '.join(map(str, rounds))}: {words}" for rounds, words in said.values()] + damaged


def _provenance(run: RunFolder, lineage: Mapping[str, Any], made_with: Mapping[str, Any]) -> dict[str, str]:
    """Return digests, versions and, where there is one, what the newest release is and who signed it."""
    return {
        "protocol digest (what sites approved)": run.digest,
        "digest of the federation's file": lineage["federation_digest"],
        "initial state": run.protocol.initial_state,
        **_released(run.path / "release"),
        "Wardround's sources (this page)": lineage["software"]["sources"],
        f"{lineage['software']['lock_of']} (this page)": lineage["software"]["lock"],
        "software of the newest round": ", ".join(f"{name} {version}" for name, version in sorted(made_with.items())),
    }


def _released(folder: Path) -> dict[str, str]:
    if not folder.exists():
        return {"release": "none yet"}
    hashes = release.check(folder)
    said = json.loads((folder / release.PROVENANCE).read_bytes())
    parent = said.get("parent")
    return {
        "released round": str(said["round"]),
        "released weights": hashes[release.WEIGHTS],
        "release signed by": release.signer(folder) or "nobody",
        "parent version": f"{parent['version']}, by {parent['by']}" if parent else "none",
    }
