"""How a federation stands, read from its run folder alone: while it runs, after it, and after a crash."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wardround.config.privacy import NoPrivacyConfig, SitePrivacyConfig, UnitPrivacyConfig
from wardround.privacy import site_level
from wardround.processes import was_left
from wardround.report.status import Doing, OpenRound, RoundFigures, SiteStatus, Status
from wardround.server.live import EVERY, Now, read_live
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.spool import Spool
from wardround.update import withholds

RECENT = 5  # rounds that throughput and time left are taken from
_SILENT = 4 * EVERY  # seconds without a word, after which nobody knows who is connected
Records = dict[int, dict[str, Any]]


class Watch:
    """Looks at a run folder again and again, and reads no committed round twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: Records = {}

    def look(self) -> Status:
        """Return how things stand now. Raises CheckpointError where there is no run, or a record is damaged."""
        run = open_run(self.path)
        done = run.committed()[1:]
        self._records = {number: self._records.get(number) or run.record(number) for number in done}
        return status_of(run, self._records, read_live(self.path), time.time())


def status_of(run: RunFolder, records: Records, live: Now, at: float) -> Status:
    """Return a run's status at a time, from its committed rounds and the last word of its process."""
    privacy, done = run.config.privacy, max(records, default=0)
    promised = None if isinstance(privacy, NoPrivacyConfig) else privacy
    recent = [_figures(number, records[number]) for number in sorted(records)[-RECENT:]]
    rounds = run.config.training.rounds
    left = sum(one.seconds for one in recent) / len(recent) * (rounds - done) if recent else None
    opened = open_round(run, done + 1, live, at) if done < rounds else None
    return Status(
        federation=run.config.name,
        digest=run.digest,
        rounds=rounds,
        committed=done,
        heard=live.at or None,
        withheld=withholds(privacy),
        unit=privacy.unit,
        epsilon=None if promised is None else promised.epsilon,
        delta=None if promised is None else promised.delta,
        spent=site_level.spent(privacy, rounds, done) if isinstance(privacy, SitePrivacyConfig) else None,
        sites={site: _site(run, site, records, live, at, opened) for site in sorted(run.members)},
        open=opened,
        recent=recent,
        seconds_left=left,
        updates=sum(len(record["sites"]) for record in records.values()),
        refusals=dict(sorted(Counter(_codes(records)).items())),
        bytes_out=sum(record["bytes_sent"] for record in records.values()),
        bytes_in=sum(record["bytes_received"] for record in records.values()),
        seconds=sum(record["seconds"] for record in records.values()),
    )


def open_round(run: RunFolder, number: int, live: Now, at: float) -> OpenRound:
    """Return the round after the last committed one, as far as it has come."""
    spool = Spool(run.round(number))
    cohort, arrived = spool.cohort(), spool.arrived()
    ended = was_left(run.path / "flower")  # `coordinate` holds it from its start to its end; `simulate` has none
    fresh = not ended and 0 <= at - live.at < _SILENT
    # A site that was refused and asked again since, or whose update is here, is refused no more.
    refused = {site: why for site, (of, why) in live.refused.items() if of == number and site not in arrived}
    asked = {site: deadline for site, (_, deadline) in live.asked.items() if site not in arrived} if fresh else {}
    awaited = sorted(set(cohort or ()) - set(arrived) - refused.keys())
    waits = [*asked.values(), *([live.until] if fresh and live.until is not None else [])]
    deadline = max(waits, default=None)
    if ended:
        return OpenRound(number, "ended", None, awaited, arrived, refused)
    if cohort is None:
        return OpenRound(number, "not begun", None, [], [], {})
    if spool.closed() is not None:
        return OpenRound(number, "folding", None, [], arrived, refused)
    if not asked and fresh and live.until is not None:
        return OpenRound(number, "waiting for sites", live.until, awaited, arrived, refused)
    return OpenRound(number, "training", deadline, awaited, arrived, refused)


def _site(run: RunFolder, site: str, records: Records, live: Now, at: float, opened: OpenRound | None) -> SiteStatus:
    counted = [number for number in sorted(records) if site in records[number]["sites"]]
    missed = [number for number in sorted(records) if site in records[number]["refused"]]
    declared: Mapping[str, Any] = records[counted[-1]]["sites"][site] if counted else {}
    private = isinstance(run.config.privacy, UnitPrivacyConfig)
    return SiteStatus(
        online=site in live.online if 0 <= at - live.at < _SILENT else None,
        seen=live.seen.get(site),
        version=declared.get("version"),
        images=declared.get("images"),
        units=run.config.membership.units.get(site) if private else None,
        rounds=len(counted),
        missed=len(missed),
        reason=f"round {missed[-1]}: {records[missed[-1]]['refused'][site]}" if missed else "",
        epsilon=declared.get("epsilon"),
        doing=_doing(site, live, opened),
    )


def _doing(site: str, live: Now, opened: OpenRound | None) -> Doing:
    if opened is None:
        return ""
    if site in opened.arrived:
        return "arrived"
    if site in opened.refused:
        return "silent" if opened.refused[site].partition(":")[0] == "silent" else "refused"
    if site in opened.awaited:
        return "asked" if site in live.asked else "waited for"
    return ""


def _figures(number: int, record: Mapping[str, Any]) -> RoundFigures:
    return RoundFigures(number, len(record["sites"]), record["seconds"], record["bytes_sent"], record["bytes_received"])


def _codes(records: Records) -> list[str]:
    """Return the code of each refusal in all committed rounds."""
    return [str(why).partition(":")[0] for record in records.values() for why in record["refused"].values()]
