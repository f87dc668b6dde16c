"""The page on a federation: what its panels say, in words that a radiologist understands first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from wardround.privacy.accounting import upward
from wardround.privacy.statement import NONE
from wardround.report.agreement import METHODS
from wardround.report.drawing import Palette, themed, variables
from wardround.report.figures import (
    Figure,
    Table,
    epsilon_figure,
    joined_figure,
    loss_figure,
    probe_figure,
    rank_figure,
)
from wardround.report.gallery import map_figure, neighbours_figure, reconstructions_figure
from wardround.report.history import History
from wardround.report.joined import FEDERATED, Compared
from wardround.report.running import bytes_figure, presence_figure, time_figure
from wardround.report.seen import Seen
from wardround.report.status import span
from wardround.update import WITHHELD

_FAILURES = 40  # newest lines of the table
Titled = tuple[tuple[str, Table], ...]  # tables, each with its title


@dataclass(frozen=True)
class Panel:
    """One part of the page."""

    key: str
    title: str
    words: tuple[str, ...]
    figures: tuple[Figure, ...] = ()
    tables: Titled = ()
    folded: Titled = ()  # to be opened
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole page: facts at its head, and panels."""

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]

    @property
    def figures(self) -> Iterator[Figure]:
        """All figures, in order."""
        return (figure for panel in self.panels for figure in panel.figures)

    def html(self, when: datetime, version: str) -> str:
        """Return the page as one file that needs nothing else. Every text is escaped: names come from outside."""
        environment = Environment(
            loader=PackageLoader("wardround", "report/templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # What is not escaped is made here: drawings, whose text matplotlib has escaped, and colours.
        made = {figure.name: Markup(themed(figure.svg)) for figure in self.figures}  # noqa: S704
        light, dark = (Markup(variables(dark=night)) for night in (False, True))  # noqa: S704
        shown = {"drawings": made, "light": light, "dark": dark, "when": f"{when:%Y-%m-%d %H:%M} UTC"}
        return environment.get_template("page.html").render(page=self, version=version, **shown)


def page_of(history: History, seen: Seen | None, compared: Compared | None, run: str) -> Page:
    """Return the page; `seen` is None without an evaluation set, `compared` without scores; `run` is for commands."""
    palette = Palette(list(history.members))
    panels = (
        _trained(history),
        _learned(history, seen, palette),
        _private(history, palette),
        _images(seen, palette),
        _brought(history, compared, palette, run),
        _ran(history, palette),
        _provenance(history),
    )
    sites = len(history.members)
    lead = (
        f"{sites} site{'s' * (sites > 1)} trained one image backbone together; no image left its site. A backbone is a "
        "network that turns an image into numbers which describe it, so that other programs can learn a task from few "
        "labelled images."
    )
    return Page(f"Federation {history.name}", lead, tuple(_facts(history, seen, compared)), panels)


def _facts(history: History, seen: Seen | None, compared: Compared | None) -> Iterator[tuple[str, str]]:
    took = span(sum(one.seconds for one in history.rounds))
    yield "rounds committed", f"{history.last.number} of {history.planned}, in {took}"
    yield "sites", str(len(history.members))
    images = [member.images for member in history.members.values() if member.counted]
    yield "images", WITHHELD if None in images else f"{sum(count or 0 for count in images):,}"
    promise = history.promise
    if promise is None:
        yield "differential privacy", "none"
    else:
        most = max(spent[-1][1] for spent in promise.spent.values())
        yield "differential privacy", f"ε {upward(most)} at most, {promise.adjacency}, δ = {promise.delta:g}"
    if seen is not None and seen.probe is not None:
        yield "k-NN, evaluation set", f"{seen.probe.by_round[max(seen.probe.by_round)]:.3f}"
    if compared is not None and compared.joined:
        gains = [one.gain for one in compared.shown]
        yield "joining brought", f"{min(gains):+.3f} to {max(gains):+.3f}"


def _trained(history: History) -> Panel:
    recipe, training = history.recipe, history.recipe.training
    size = " by ".join([str(recipe.data.image_size)] * recipe.data.dimensions)
    unit = history.promise.unit if history.promise else "none"
    drawn = f"{unit}s on average, drawn by chance" if unit in ("patient", "image") else "images"
    colour = {1: "grey", 3: "colour"}.get(recipe.data.channels, f"{recipe.data.channels}-channel")
    words = (
        f"Who: {', '.join(history.members)}.",
        f"What: the network {recipe.backbone.name} learned from {colour} images of {size} pixels, without any label. "
        f"By its method, {recipe.method.name}, it {METHODS.get(recipe.method.name, 'learns by itself')}.",
        f"How: in each of {history.planned} rounds, every site trained the common network on its own images for "
        f"{training.local_steps:,} steps of {training.batch_size:,} {drawn}, and sent back how the network's numbers "
        f"had changed. The coordinator joined the changes (rule: {recipe.aggregation.rule}) into the network of the "
        "next round.",
    )
    settings = Table(("key", "value"), tuple(_flat(recipe.model_dump(mode="json", exclude={"initial_state"}))))
    folded = (("Every setting that the sites approved", settings),)
    return Panel("trained", "What was trained, and by whom", words, (), (("The sites", _members(history)),), folded)


def _members(history: History) -> Table:
    """Return the sites with what they declared."""
    private = history.promise is not None and any(one.units is not None for one in history.members.values())
    names: tuple[str, ...] = ("images", "patients")
    if private and history.promise is not None:
        names = (f"declared {history.promise.unit}s",)
    rows = []
    for site, member in history.members.items():
        counts = (member.units,) if private else (member.images, member.patients)
        said = (
            [WITHHELD if count is None else f"{count:,}" for count in counts] if member.counted else [""] * len(names)
        )
        weight = "" if member.weight is None else f"{member.weight:.3f}"
        rows.append((site, *said, weight, str(member.counted), str(member.missed)))
    return Table(("site", *names, "weight in its newest round", "rounds counted", "rounds missed"), tuple(rows))


def _learned(history: History, seen: Seen | None, palette: Palette) -> Panel:
    loss = loss_figure(history, palette)
    probe = None if seen is None or seen.probe is None else probe_figure(seen.probe, palette)
    rank = rank_figure(history, {} if seen is None else seen.rank, palette)
    words = [
        "Three signs of learning: the network gets better at its own task, similar images carry the same label, and "
        "images are told apart in many ways rather than one."
    ]
    if loss is None:
        whom = "sites" if history.promise and history.promise.unit == "site" else "patients"
        words.append(
            f"Loss and effective rank at the sites are {WITHHELD}: they would leave without the noise that protects "
            f"{whom}."
        )
    if seen is None:
        words.append("k-NN is not there: the coordinator has no evaluation set (see below how to get one).")
    elif seen.probe is None:
        words.append(f"k-NN is not there: {seen.missing['probe'].rstrip('.')}.")
    warned = Table(("what the coordinator was told",), tuple((one,) for one in history.warnings))
    figures = tuple(one for one in (loss, probe, rank) if one is not None)
    return Panel("learned", "Did it learn?", tuple(words), figures, (("Warnings", warned),) if warned.rows else ())


def _private(history: History, palette: Palette) -> Panel:
    promise = history.promise
    if promise is None:
        words = (
            f"Differential privacy: {NONE}.",
            "No image left its site, but what the sites sent was made from images, and nothing bounds what it tells of "
            "one patient. So there is no ε to show.",
        )
        return Panel("privacy", "Privacy", words)
    words = (
        f"ε (epsilon) bounds how much anybody can learn about one {promise.unit} from all that was sent: the smaller, "
        f"the less. Every ε here is under adding or removing one {promise.unit}, at δ = {promise.delta:g}.",
        f"The federation plans {promise.planned:g} for all rounds, each trained once. Above {promise.ceiling:g}, its "
        "ceiling, no backbone becomes its champion. A site's own ceiling, over all federations that it takes part in, "
        "stays at the site, which enforces it.",
    )
    said = Table(("what holds",), tuple((one,) for one in promise.statements))
    figure = epsilon_figure(promise, history.planned, palette)
    return Panel("privacy", "Privacy", words, (figure,), (), (("The promise, word for word", said),))


def _images(seen: Seen | None, palette: Palette) -> Panel:
    title = "What it makes of images"
    if seen is None:
        none = (
            "There is nothing to show: the coordinator has no images of its own, and a site's never leave it. Name a "
            "labelled folder of public images, or of your own, in the federation's file. It needs no site's approval; "
            "start the command of the run again with it, then make this page anew.",
        )
        return Panel("images", title, none, commands=("[evaluation_set]", 'kind = "labelled"', 'folder = "images"'))
    words = (
        f"All images here are the coordinator's own: its evaluation set of {seen.images:,}. What lies at a site is "
        "never read for this page.",
        *(f"Without {name}: {why.rstrip('.')}." for name, why in seen.missing.items() if name != "probe"),
    )
    figures = (
        None if seen.reconstructions is None else reconstructions_figure(seen.reconstructions),
        None if seen.neighbours is None else neighbours_figure(seen.neighbours),
        None if seen.map is None else map_figure(seen.map, palette),
    )
    return Panel("images", title, words, tuple(one for one in figures if one is not None))


def _brought(history: History, compared: Compared | None, palette: Palette, run: str) -> Panel:
    title = "What joining brought each site"
    figure = None if compared is None else joined_figure(compared, palette)
    if compared is None or figure is None:
        why = "No scores were given" if compared is None else "No arm of the scores has a site's name"
        words = (
            f"{why}. To know what joining brought, train each site's backbone alone, measure it beside the "
            "federation's on the same images, and make this page anew. A site can do so at home, on its own patients, "
            "and hand over its scores.json, which holds no image.",
        )
        commands = tuple(_ask(list(history.members), run))
        return Panel("joining", title, words, (), _arms(compared), commands=commands)
    words = (
        "Each site's backbone, trained on its own images alone by the same method, beside the federation's: the same "
        f"labelled images, the same linear probe, with {compared.labels:.0%} of the labels. Scores are "
        f"{compared.metric}, from 0 to 1.",
    )
    return Panel("joining", title, words, (figure,), (), _arms(compared))


def _ask(sites: list[str], run: str) -> Iterator[str]:
    """Give the commands that measure what joining brought."""
    first = sites[0]
    yield f"# for each site: the federation's file with another name, and below [membership.sites] only {first} = 1.0"
    yield f"wardround simulate {first}.toml --data DATA --out runs/{first}"
    yield "# then, with test patients whom nobody trained on"
    yield f"wardround evaluate {run} --data DATA --by site --out scores.json \\"
    yield from (f"  --against {site}=runs/{site}{' ' + chr(92) if site != sites[-1] else ''}" for site in sites)
    yield f"wardround report {run} --scores scores.json"


def _arms(compared: Compared | None) -> Titled:
    """Return everything that was measured on all test images."""
    if compared is None:
        return ()
    rows = []
    for file, arm, score in compared.arms:
        ends = "" if score.low is None else f"{score.low:.2f} to {score.high:.2f}"
        rows.append((file, "the federation's" if arm == FEDERATED else arm, f"{score.mean:.3f}", ends))
    columns = ("file", "backbone", compared.metric, "95 % interval")
    return (("All that was measured, floors included", Table(columns, tuple(rows))),)


def _ran(history: History, palette: Palette) -> Panel:
    newest = reversed(history.failures[-_FAILURES:])
    failed = Table(("round", "site", "reason"), tuple((str(number), site, one.reason) for number, site, one in newest))
    figures = (presence_figure(history, palette), time_figure(history, palette), bytes_figure(history, palette))
    words = (
        "Who took part, how long it took, and what crossed the network. A round goes on without a site that does not "
        "answer, if enough others do.",
    )
    return Panel(
        "running", "How it ran", words, figures, (("What failed, newest first", failed),) if failed.rows else ()
    )


def _provenance(history: History) -> Panel:
    words = ("For whoever compares: what was agreed, what came of it, and by which software.",)
    values = Table(("what", "value"), tuple(history.provenance.items()))
    states = Table(("round", "SHA-256 of its state"), tuple((str(one.number), one.state) for one in history.rounds))
    return Panel("provenance", "Provenance", words, (), (("", values),), (("The weights of each round", states),))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Give a nested mapping as `section.key`, value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
