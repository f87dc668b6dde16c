"""The figures of a report that are curves: each with what it shows in a sentence, and its numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from wardround.privacy.accounting import upward
from wardround.report.drawing import INK, MUTED, Palette, drawn, legend, svg
from wardround.report.history import History, Promise, SiteRound
from wardround.report.joined import Compared, Joined, Score
from wardround.report.seen import Probe

WIDTH, HEIGHT = 5.0, 3.1  # inches: text is still readable where a telephone shrinks it
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Table:
    """Numbers, as text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A picture with all that a reader needs who does not see it."""

    name: str  # of its file
    title: str
    finding: str  # what it shows: its text alternative
    svg: str
    table: Table
    hint: str = ""  # how to read it
    wide: bool = False


def loss_figure(history: History, palette: Palette) -> Figure | None:
    """Return the loss by round and site, None where it is withheld."""
    sites = by_site(history, lambda one: one.loss)
    together = [(one.number, one.loss) for one in history.rounds if one.loss is not None]
    if not sites or not together:
        return None
    (first, begun), (last, ended) = together[0], together[-1]
    ends = {site: points[-1][1] for site, points in sites.items()}
    low, high = min(ends, key=lambda site: ends[site]), max(ends, key=lambda site: ends[site])
    finding = f"The sites' mean loss {_went(begun, ended, '.3f')} between round {first} and round {last}"
    finding += "."
    if ends[low] < ends[high]:
        finding += f" Now it is lowest at {low} ({ends[low]:.3f}) and highest at {high} ({ends[high]:.3f})."
    return _curves(
        ("loss", "Loss by round and site", finding),
        {**sites, "mean by weight": together},
        palette,
        ".4f",
        "How far the network is from solving its own training task at the end of a round: lower is better. Between "
        "methods, losses cannot be compared.",
    )


def rank_figure(history: History, seen: Mapping[int, float], palette: Palette) -> Figure | None:
    """Return the effective rank by round: of each site on its own images, and on the evaluation set."""
    sites = by_site(history, lambda one: one.effective_rank)
    lines: dict[str, Points] = dict(sites)
    if seen:
        lines["evaluation set"] = sorted(seen.items())
    if not lines:
        return None
    newest = {name: points[-1][1] for name, points in lines.items()}
    low, high = min(newest.values()), max(newest.values())
    before = {name: points[0][1] for name, points in lines.items()}
    finding = f"Effective rank was {_range(before.values())} at first and is {_range(newest.values())} now"
    finding += f", lowest for {min(newest, key=lambda name: newest[name])}." if low < high else "."
    hint = (
        "In how many independent ways the features of images differ. Near 1, all images look alike to the network: it "
        "has collapsed."
    )
    return _curves(("rank", "Effective rank of the features", finding), lines, palette, ".1f", hint)


def probe_figure(probe: Probe, palette: Palette) -> Figure:
    """Return k-NN by round on the evaluation set, with the floor that pixels give."""
    numbers = sorted(probe.by_round)
    begun, ended = probe.by_round[numbers[0]], probe.by_round[numbers[-1]]
    ends = "" if probe.ends is None else f" (95 % interval {probe.ends[0]:.2f} to {probe.ends[1]:.2f})"
    floor = max(probe.raw_pixels, begun)
    beats = "beats both"
    if ended <= floor:
        beats = "does NOT beat both"
    elif probe.ends is None or probe.ends[0] <= floor:
        beats = "beats both, but by no more than chance may give"
    finding = (
        f"k-NN {_went(begun, ended, '.3f')} between the start and round {numbers[-1]}{ends}; raw pixels give "
        f"{probe.raw_pixels:.3f}: the backbone {beats}."
    )
    lines: dict[str, Points] = {site: sorted(by_round.items()) for site, by_round in probe.by_site.items()}
    lines["all"] = sorted(probe.by_round.items())
    lines["raw pixels"] = [(number, probe.raw_pixels) for number in numbers]
    hint = (
        f"Is an image's label that of the 20 most similar labelled images? Balanced accuracy on {probe.queries:,} test "
        f"images of {probe.patients:,} patients, among {probe.gallery:,} training images; guessing gives "
        f"{1 / probe.classes:.2f}. A site's line is of its own patients in the set, so of fewer."
    )
    return _curves(("knn", "k-NN on the evaluation set", finding), lines, palette, ".3f", hint)


def epsilon_figure(promise: Promise, planned: int, palette: Palette) -> Figure:
    """Return epsilon spent by round and site, against the ceiling."""
    last = {site: points[-1] for site, points in promise.spent.items()}
    most = max(last, key=lambda site: last[site][1])
    held = f"under adding or removing one {promise.unit}, at δ = {promise.delta:g}"
    over = sorted(site for site, (_, spent) in last.items() if spent > promise.ceiling)
    finding = f"Until round {last[most][0]} of {planned}, {most} has spent the most, ε = {upward(last[most][1])} {held}"
    finding += f"; {', '.join(over)} passed the ceiling of {promise.ceiling:g}" if over else ""
    finding += "." if over else f"; nobody has passed the ceiling of {promise.ceiling:g}."
    columns = ("site", "round", f"ε spent, per {promise.unit}", "ceiling", "left")
    rows = tuple(
        (site, str(number), upward(spent), f"{promise.ceiling:g}", f"{max(0.0, promise.ceiling - spent):.3f}")
        for site, points in promise.spent.items()
        for number, spent in points
    )
    with drawn(WIDTH, HEIGHT) as figure:
        axis = figure.subplots()
        for site, points in promise.spent.items():
            draw_line(axis, site, [(0, 0.0), *points], palette)
        axis.axhline(promise.ceiling, color=INK, linestyle=(0, (5, 3)), linewidth=1.4, label="ceiling")
        _axes(axis, "round", f"ε spent (one {promise.unit}, δ = {promise.delta:g})")
        axis.set_xlim(0, planned * 1.02)
        axis.set_ylim(0, max(promise.ceiling, *(spent for _, spent in last.values())) * 1.08)
        legend(axis, 3)
        drawing = svg(figure, "epsilon")
    hint = "A line must stay below the dashed ceiling. What is spent never comes back."
    return Figure("epsilon", "Privacy budget by site", finding, drawing, Table(columns, rows), hint)


def joined_figure(compared: Compared, palette: Palette) -> Figure | None:
    """Return each site's own backbone beside the federation's; its own test patients where they were told apart."""
    shown = compared.shown
    if not shown:
        return None
    finding = _gains(shown)
    with drawn(WIDTH * 1.5, 0.55 * len(shown) + 1.1) as figure:
        axis = figure.subplots()
        for place, one in enumerate(reversed(shown)):
            colour = palette.colour(one.site)
            axis.plot([one.local.mean, one.federated.mean], [place, place], color=colour, linewidth=3, alpha=0.45)
            for score, up in ((one.local, -0.13), (one.federated, 0.13)):
                if score.low is not None and score.high is not None:
                    axis.plot([score.low, score.high], [place + up] * 2, color=colour, linewidth=1)
            axis.plot(one.local.mean, place, "o", color=colour, markerfacecolor="none", markersize=9, markeredgewidth=2)
            axis.plot(one.federated.mean, place, "o", color=colour, markersize=9)
            if one.random is not None:
                axis.plot(one.random.mean, place, "|", color=MUTED, markersize=13, markeredgewidth=2)
        axis.plot([], [], "o", color=INK, markerfacecolor="none", markersize=8, label="its own backbone")
        axis.plot([], [], "o", color=INK, markersize=8, label="the federation's")
        axis.plot([], [], "|", color=MUTED, markersize=12, markeredgewidth=2, label="untrained")
        axis.set_yticks(range(len(shown)), [one.site for one in reversed(shown)], color=INK)
        axis.set(xlabel=f"{compared.metric}, linear probe", ylim=(-0.6, len(shown) - 0.4))
        axis.grid(axis="x")
        legend(axis, 3)
        drawing = svg(figure, "joined")
    columns = ("site", "measured on", "images / patients", "its own", "the federation's", "difference", "untrained")
    rows = tuple(
        (
            one.site, one.where, f"{one.images:,} / {one.patients:,}", _cell(one.local), _cell(one.federated),
            f"{one.gain:+.3f}", "" if one.random is None else _cell(one.random),
        )
        for one in compared.joined
    )  # fmt: skip
    hint = f"On {shown[0].where}. Thin lines are 95 % intervals: where they "
    hint += "overlap, the difference may be chance."
    return Figure("joined", "What joining brought each site", finding, drawing, Table(columns, rows), hint, wide=True)


def _gains(shown: Sequence[Joined]) -> str:
    """Return at how many sites joining helped, whether that is sure, and where it taught nothing."""
    better = [one for one in shown if one.gain > 0]
    said = f"At {len(better)} of {len(shown)} sites the federation's backbone scores above the site's own"
    said += f", by {_range([one.gain for one in better], '.3f')}" if better else ""
    worse = [f"{one.site} ({one.gain:+.3f})" for one in shown if one.gain <= 0]
    said += f"; not at {', '.join(worse)}." if worse else "."
    sure = [one.site for one in shown if one.sure]
    said += f" Surer than chance: {', '.join(sure)}." if sure else " Nowhere is the difference surer than chance."
    taught = [one.site for one in shown if one.random and one.federated.mean <= one.random.mean]
    return said + (f" The untrained network does as well at {', '.join(taught)}." if taught else "")


def _curves(words: tuple[str, str, str], lines: Mapping[str, Points], palette: Palette, form: str, hint: str) -> Figure:
    """Return a figure of a line a site, and of others in ink; `words` are its name, title and finding."""
    with drawn(WIDTH, HEIGHT) as figure:
        axis = figure.subplots()
        for name, points in lines.items():
            draw_line(axis, name, points, palette)
        _axes(axis, "round", "")
        if words[0] == "rank":
            axis.set_ylim(bottom=1.0)  # collapsed: how far from it is what matters
        legend(axis, 3)
        drawing = svg(figure, words[0])
    numbers = sorted({number for points in lines.values() for number, _ in points})
    known = {name: dict(points) for name, points in lines.items()}
    rows = tuple(
        (str(number), *(f"{of[number]:{form}}" if number in of else "" for of in known.values())) for number in numbers
    )
    return Figure(*words, drawing, Table(("round", *known), rows), hint)


def draw_line(axis: Axes, name: str, points: Points, palette: Palette) -> None:
    """Draw a site's line in its colour and with its marks, a floor's dashed, any other in ink."""
    x, y = [number for number, _ in points], [value for _, value in points]
    every = max(1, len(x) // 12)
    if name in palette.places:
        colour, mark = palette.colour(name), palette.mark(name)
        axis.plot(x, y, color=colour, label=name, marker=mark, markersize=4.5, markevery=every)
    elif name == "raw pixels":
        axis.plot(x, y, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.4, label=name)
    else:
        axis.plot(x, y, color=INK, linewidth=2.6, label=name)


def _axes(axis: Axes, x: str, y: str) -> None:
    axis.set(xlabel=x, ylabel=y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(length=0)


def by_site(history: History, value: Callable[[SiteRound], float | None]) -> dict[str, Points]:
    """Return each site's (round, value) pairs, of sites that have some."""
    found: dict[str, list[tuple[int, float]]] = {site: [] for site in history.members}
    for one in history.rounds:
        for site, of_site in one.sites.items():
            number = value(of_site)
            if number is not None:
                found[site].append((one.number, number))
    return {site: points for site, points in found.items() if points}


def _went(before: float, after: float, form: str) -> str:
    """Return how a number changed, in words.

    >>> _went(1.0, 0.5, ".1f"), _went(1.0, 1.0, ".1f")
    ('fell from 1.0 to 0.5', 'stayed at 1.0')
    """
    first, last = f"{before:{form}}", f"{after:{form}}"
    if first == last:
        return f"stayed at {first}"
    return f"{'fell' if after < before else 'rose'} from {first} to {last}"


def _range(values: Iterable[float], form: str = ".1f") -> str:
    found = sorted(values)
    low, high = f"{found[0]:{form}}", f"{found[-1]:{form}}"
    return low if low == high else f"{low} to {high}"


def _cell(score: Score) -> str:
    mean = f"{score.mean:.3f}"
    return mean if score.low is None else f"{mean} ({score.low:.2f} to {score.high:.2f})"
