"""How a federation stands, as a person sees it in a terminal and a machine as JSON.

Apart from `tables`, which loads torch with the plan: this is drawn every second.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from wardround.privacy.accounting import upward
from wardround.update import WITHHELD

REFRESH = 1.0  # seconds

# What a site does in the open round.
Doing = Literal["", "asked", "arrived", "refused", "silent", "waited for"]


@dataclass(frozen=True)
class SiteStatus:
    """One site. What it declared is of its last update that counted; None where there is none, or it withholds it."""

    online: bool | None  # None where nobody has said for a while
    seen: float | None  # when it was last connected, in seconds since 1970
    version: str | None  # Wardround's at the site
    images: int | None
    units: int | None  # with a patient or image as privacy unit: the declared number of them
    rounds: int  # in which its update counted
    missed: int  # in which it was refused, or silent
    reason: str  # of the newest of those, with its round
    epsilon: float | None  # spent in this federation by what counted
    doing: Doing


@dataclass(frozen=True)
class OpenRound:
    """The round that is not committed yet."""

    number: int
    state: Literal["not begun", "waiting for sites", "training", "folding", "ended"]  # ended: the coordinator has
    deadline: float | None  # of the site that has longest, in seconds since 1970
    awaited: list[str]
    arrived: list[str]
    refused: dict[str, str]  # site -> code and reason


@dataclass(frozen=True)
class RoundFigures:
    """What one committed round took."""

    number: int
    sites: int
    seconds: float
    bytes_out: int  # to the sites
    bytes_in: int


@dataclass(frozen=True)
class Status:
    """A federation at one moment."""

    federation: str
    digest: str
    rounds: int
    committed: int
    heard: float | None  # when the process of the rounds last gave word, in seconds since 1970
    withheld: bool  # whether sites declare no figure that was measured on images
    unit: str  # of privacy: none, patient, image or site
    epsilon: float | None  # what the federation promises to spend at most where every round is trained once
    delta: float | None  # at which every epsilon here is meant
    spent: float | None  # with a site as unit: by the rounds that are committed
    sites: dict[str, SiteStatus]
    open: OpenRound | None  # None once all rounds are committed
    recent: list[RoundFigures]  # the last rounds, oldest first
    seconds_left: float | None  # as the recent rounds went; None before the first
    updates: int  # folded in all
    refusals: dict[str, int]  # by code, in all rounds
    bytes_out: int
    bytes_in: int
    seconds: float  # of all rounds


def show(look: Callable[[], Status], console: Console) -> None:
    """Print how things stand: once, or in a terminal again and again until Ctrl-C or the last round."""
    status = look()
    if not console.is_terminal or status.open is None:
        console.print(view(status, time.time()))
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(status, time.time()), refresh=True)
            if status.open is None:
                return
            time.sleep(REFRESH)
            status = look()


def to_json(status: Status) -> str:
    """Return all of a status as one JSON object; times are seconds since 1970."""
    return json.dumps(asdict(status), indent=2)


def view(status: Status, now: float) -> Group:
    """Return a status as a person reads it at a time."""
    lines = [_head(status), *_open_lines(status, now), *_figures(status), *_missed(status)]
    return Group(sites_table(status, now), *(Text(line) for line in lines))


def sites_table(status: Status, now: float) -> Table:
    """Return a line for each site."""
    private = status.unit in ("patient", "image")
    made = Table(title=escape(status.federation), title_justify="left", title_style="bold", header_style="bold")
    if private:
        made.caption, made.caption_justify = f"epsilon: spent of what is promised, {_of_what(status)}", "left"
    names = ("site", "online", "last seen", "version", "images", "rounds", "missed")
    for name in (*names, *(["epsilon"] if private else []), "this round"):
        made.add_column(name, justify="right" if name in ("images", "rounds", "missed", "epsilon") else "left")
    for name, site in status.sites.items():
        images = "" if site.images is None else f"{site.images:,}"
        if status.withheld:
            images = f"{WITHHELD}; {site.units:,} {status.unit}s declared" if site.units else WITHHELD
        online = {True: "yes", False: "no", None: "?"}[site.online]
        seen = "" if site.seen is None else f"{span(now - site.seen)} ago"
        cells = [name, online, seen, site.version or "", images, str(site.rounds), str(site.missed)]
        if private:
            cells.append("" if site.epsilon is None else _of(site.epsilon, status.epsilon))
        made.add_row(*map(escape, cells), site.doing)
    return made


def span(seconds: float) -> str:
    """Return a time as a person says it.

    >>> span(8.2), span(600), span(9000), span(200000)
    ('8 s', '10 min', '2.5 h', '2.3 days')
    """
    for size, name, form in ((86_400, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= size:
            return f"{seconds / size:{form}} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _head(status: Status) -> str:
    left = f"; about {span(status.seconds_left)} left" if status.seconds_left else ""
    spent = (
        f"; epsilon {_of(status.spent, status.epsilon)} spent, {_of_what(status)}" if status.spent is not None else ""
    )
    return f"{status.committed} of {status.rounds} rounds are committed{left}{spent}. Protocol {status.digest[:12]}."


def _open_lines(status: Status, now: float) -> list[str]:
    """Return the open round, and whether anybody works on it."""
    if status.open is None:
        return []
    one = status.open
    ended = one.state == "ended"
    state = "the coordinator has ended: start the same command again to go on" if ended else one.state
    line = f"Round {one.number}: {state}"
    if one.deadline is not None:
        line += f", {span(one.deadline - now)} to its deadline"
    line += f"; {len(one.arrived)} arrived"
    line += f"; awaited: {', '.join(one.awaited)}" if one.awaited else ""
    lines = [f"{line}."]
    lines += [f"Round {one.number}, without '{site}': {reason}" for site, reason in sorted(one.refused.items())]
    if status.heard is None:
        lines.append("Nobody has worked on this run yet.")
    elif now - status.heard > 60:
        why = "" if ended else ": it is busy by itself, or has ended"
        lines.append(f"The process of the rounds last gave word {span(now - status.heard)} ago{why}.")
    return lines


def _figures(status: Status) -> list[str]:
    """Return what the last rounds took."""
    if not status.recent:
        return []
    count = len(status.recent)
    seconds = sum(one.seconds for one in status.recent) / count
    out, came = (sum(getattr(one, name) for one in status.recent) / count for name in ("bytes_out", "bytes_in"))
    rate = (out + came) / seconds / 1e6 if seconds else 0.0
    return [
        f"A round takes {span(seconds)}, {out / 1e6:,.1f} MB out and {came / 1e6:,.1f} MB in, {rate:.2f} MB/s (mean of "
        f"the last {count})."
    ]


def _missed(status: Status) -> list[str]:
    missed = {name: site for name, site in status.sites.items() if site.missed}
    return [
        f"'{name}' missed {site.missed} round{'s' * (site.missed > 1)}; the last: {site.reason}"
        for name, site in missed.items()
    ]


def _of_what(status: Status) -> str:
    return f"under adding or removing one {status.unit}, at delta = {status.delta:g}"


def _of(spent: float, whole: float | None) -> str:
    return upward(spent) if whole is None else f"{upward(spent)} of {whole:g}"
