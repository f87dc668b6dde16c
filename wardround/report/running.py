"""The figures of how a federation ran: time, bytes, and who was missing."""

from collections import Counter

from matplotlib.ticker import FuncFormatter, MaxNLocator

from wardround.report.drawing import GRID, INK, MUTED, Palette, drawn, legend, svg
from wardround.report.figures import HEIGHT, WIDTH, Figure, Table, by_site, draw_line
from wardround.report.history import History
from wardround.report.status import span

SHOWN = 60  # rounds of the picture of who was there: the newest
_SIGNS = {"counted": ("o", "counted"), "refused": ("X", "refused or silent"), "late": ("D", "too late"),
          "training": (">", "still training"), "not asked": (".", "not asked")}  # fmt: skip


def time_figure(history: History, palette: Palette) -> Figure:
    """Return the seconds of each round, and of training at each site where it is declared."""
    rounds = history.rounds
    total = sum(one.seconds for one in rounds)
    longest = max(rounds, key=lambda one: one.seconds)
    finding = (
        f"{len(rounds)} rounds took {span(total)}, {total / len(rounds):,.0f} s each on average; the longest, round "
        f"{longest.number}, {longest.seconds:,.0f} s."
    )
    trained = by_site(history, lambda one: one.seconds)
    with drawn(WIDTH, HEIGHT) as figure:
        axis = figure.subplots()
        axis.bar([one.number for one in rounds], [one.seconds for one in rounds], color=GRID, label="whole round")
        for site, points in trained.items():
            draw_line(axis, site, points, palette)
        axis.set(xlabel="round", ylabel="seconds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(length=0)
        legend(axis, 3)
        drawing = svg(figure, "time")
    known = {site: dict(points) for site, points in trained.items()}
    rows = tuple(
        (
            str(one.number), f"{one.seconds:.1f}",
            *("" if one.number not in of else f"{of[one.number]:.1f}" for of in known.values()),
        )
        for one in rounds
    )  # fmt: skip
    hint = "Bars: from the first task to the commit, with all waiting. Lines: a site's own training, as it declares it."
    if not trained:
        hint = "From the first task to the commit, with all waiting. How long a site trained is withheld."
    return Figure("time", "Time by round and site", finding, drawing, Table(("round", "seconds", *known), rows), hint)


def bytes_figure(history: History, palette: Palette) -> Figure:
    """Return what crossed in each round: in from each site where that is known, and out to all of them."""
    rounds = history.rounds
    out, came = sum(one.bytes_sent for one in rounds), sum(one.bytes_received for one in rounds)
    finding = f"{_size(out)} went out to the sites and {_size(came)} came in, in {len(rounds)} rounds."
    sites = [site for site in history.members if any(one.sites[site].received for one in rounds if site in one.sites)]
    numbers = [one.number for one in rounds]
    with drawn(WIDTH, HEIGHT) as figure:
        axis = figure.subplots()
        bottom = [0.0] * len(rounds)
        for site in sites:
            heights = [float((one.sites[site].received or 0) if site in one.sites else 0) for one in rounds]
            axis.bar(numbers, heights, bottom=bottom, color=palette.colour(site), label=site, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        rest = [max(0.0, one.bytes_received - low) for one, low in zip(rounds, bottom, strict=True)]
        if sum(rest):
            axis.bar(numbers, rest, bottom=bottom, color=MUTED, label="from sites", width=0.7)
        axis.plot(numbers, [one.bytes_sent for one in rounds], "_", color=INK, markersize=12, markeredgewidth=2.2,
                  label="out to all")  # fmt: skip
        axis.set(xlabel="round")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(length=0)
        legend(axis, 3)
        drawing = svg(figure, "bytes")
    columns = ("round", "out to all", "in from all", *(f"from {site}" for site in sites))
    rows = tuple(
        (
            str(one.number), f"{one.bytes_sent:,}", f"{one.bytes_received:,}",
            *(f"{(one.sites[site].received or 0) if site in one.sites else 0:,}" for site in sites),
        )
        for one in rounds
    )  # fmt: skip
    hint = "Only changes of the network's numbers and a few figures cross; no image does. The table is in bytes."
    return Figure("bytes", "Bytes by round and site", finding, drawing, Table(columns, rows), hint)


def presence_figure(history: History, palette: Palette) -> Figure:
    """Return who was in which of the newest rounds, and who was not."""
    rounds, sites = history.rounds[-SHOWN:], list(history.members)
    failed = Counter(site for _, site, _ in history.failures)
    finding = "Every update that was asked for came and counted."
    if failed:
        missed = ", ".join(f"{site} {count} of {len(history.rounds)}" for site, count in failed.most_common())
        finding = f"Rounds without an update that was asked for: {missed}."
    outcomes = {
        (one.number, site): one.sites[site].outcome if site in one.sites else "not asked"
        for one in rounds
        for site in sites
    }
    with drawn(WIDTH * 1.5, 0.34 * len(sites) + 1.2) as figure:
        axis = figure.subplots()
        for kind, (mark, label) in _SIGNS.items():
            places = [(number, sites.index(site)) for (number, site), found in outcomes.items() if found == kind]
            if not places:
                continue
            colours = [palette.colour(sites[y]) if kind in ("counted", "training") else INK for _, y in places]
            size = 46 if kind != "not asked" else 14
            axis.scatter([x for x, _ in places], [y for _, y in places], c=colours, marker=mark, s=size, linewidths=0)
            axis.scatter([], [], c=INK if kind != "counted" else MUTED, marker=mark, s=size, linewidths=0, label=label)
        axis.set_yticks(range(len(sites)), sites, color=INK)
        axis.set(xlabel="round", ylim=(len(sites) - 0.5, -0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(length=0)
        legend(axis, 4)
        drawing = svg(figure, "presence")
    rows = tuple(
        (site, str(member.counted), str(member.missed), _why(history, site)) for site, member in history.members.items()
    )
    table = Table(("site", "rounds counted", "missed", "newest reason"), rows)
    hint = f"The newest {SHOWN} rounds are drawn." if len(history.rounds) > SHOWN else ""
    return Figure("presence", "Who was in which round", finding, drawing, table, hint, wide=True)


def _why(history: History, site: str) -> str:
    """Return the reason of a site's newest failure."""
    reasons = [f"round {number}: {found.reason}" for number, name, found in history.failures if name == site]
    return reasons[-1] if reasons else ""


def _size(count: float) -> str:
    """Return bytes as a person says them.

    >>> _size(9_400), _size(86_000_000), _size(0)
    ('9.4 kB', '86.0 MB', '0 B')
    """
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {name}"
    return f"{count:.0f} B"
