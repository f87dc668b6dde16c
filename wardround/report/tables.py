"""The tables that commands print."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from wardround.config import FederationConfig
from wardround.config.privacy import NoPrivacyConfig, UnitPrivacyConfig
from wardround.data import SiteImages
from wardround.plan import Budget, Cost, Plan
from wardround.privacy.accounting import upward
from wardround.privacy.statement import statement
from wardround.update import WITHHELD


def told(figures: Iterable[Any], together: Callable[[list[Any]], float], form: str) -> str:
    """Return the sites' figures put together, as text, or the word for what a site withholds.

    >>> told([1300, 4], sum, ","), told([1300, None], sum, ",")
    ('1,304', 'withheld')
    """
    known = list(figures)
    return WITHHELD if None in known else f"{together(known):{form}}"


def table(title: str, *columns: str) -> Table:
    """Return an empty table; all columns but the first are numbers, to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right")
    return made


def plan_table(plan: Plan, cost: Cost) -> Table:
    """Return what a config resolves to, and what it costs a site."""
    config, training = plan.config, plan.config.training
    seconds = training.total_steps * cost.seconds_per_step
    span = f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    private = isinstance(config.privacy, UnitPrivacyConfig)
    drawn = f"{config.privacy.unit}s on average, by chance" if private else "images"
    rows = {
        "protocol digest": plan.digest,
        "backbone": f"{config.backbone.name}, {cost.backbone_parameters:,} parameters",
        "method": f"{config.method.name}, head {cost.head_parameters:,} parameters (thrown away)",
        "loss": f"couples images: {cost.coupling}" if cost.coupling else "decomposes over images, so over patients",
        "images": f"{' x '.join(str(edge) for edge in config.data.shape[1:])}, {config.data.channels} channel(s)",
        "rounds": f"{training.rounds} of {training.local_steps} local steps",
        "batch": f"{training.batch_size} {drawn}, {training.precision}",
        "bytes a round and site": f"at most {cost.bytes_per_message:,} down, as many up ({config.encoding}); "
        f"at first {cost.bytes_per_state:,} down",
        "memory at a site": f"about {cost.memory_bytes / 2**20:,.0f} MiB beside Python and its libraries",
        "time at a site": f"about {span} of steps in all on this machine ({cost.seconds_per_step:.2f} s a step)",
        "sites": ", ".join(sorted(config.membership.sites)) or "whoever is in the data or connects",
        "differential privacy": statement(config.privacy, training.rounds),
    }
    made = table(f"{config.name}", "what", "value")
    made.columns[1].justify, made.columns[1].overflow = "left", "fold"  # a digest is to be copied whole
    for name, value in rows.items():
        made.add_row(name, escape(value))  # a section's name in brackets is no markup
    return made


def budget_table(config: FederationConfig, sites: Mapping[str, Budget]) -> Table:
    """Return what each site draws, adds and spends: epsilon after some of the rounds, at the config's delta."""
    privacy = config.privacy
    assert not isinstance(privacy, NoPrivacyConfig)
    marks = sorted({-(-config.training.rounds * part // 4) for part in (1, 2, 3, 4)} | {1})
    title = f"Epsilon at delta = {privacy.delta:g}, add/remove one {privacy.unit}, each round trained once"
    made = table(title, "site", "units", "drawn a step", "noise / C", *(f"round {mark}" for mark in marks))
    for site, budget in sites.items():
        after = [next(spent for done, spent in budget.curve if done >= mark) for mark in marks]
        figures = (f"{budget.units:,}", f"{budget.rate:.4g}", f"{budget.noise:.4g}")
        made.add_row(site, *figures, *(upward(spent) for spent in after))
    return made


def check_table(findings: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return what `wardround site check` found: what, found, severity, and a remedy, which stands below the table."""
    made = table("Site check", "what", "", "found")
    styles = {"well": "green", "warning": "yellow", "problem": "bold red"}
    for column in made.columns[1:]:
        column.justify, column.overflow = "left", "fold"
    for what, found, severity, _ in findings:
        made.add_row(what, f"[{styles[severity]}]{severity}[/]", escape(found))
    return made


def index_table(sites: Mapping[str, SiteImages]) -> Table:
    """Return what was found at each site."""
    made = table("Sites", "site", "patients", "images", "quarantined", "excluded", "opted out")
    for site, images in sorted(sites.items()):
        index = images.index
        excluded = sum(index.excluded.values())
        numbers = (images.num_patients, images.num_images, len(index.quarantined), excluded, index.opted_out)
        made.add_row(site, *(str(number) for number in numbers))
    return made


def left_out_lines(sites: Mapping[str, SiteImages], most: int = 5) -> list[str]:
    """Return why files are left out: counts by criterion, and the first quarantined files. These stay at the site."""
    lines = []
    for site, images in sorted(sites.items()):
        index, quarantined = images.index, images.index.quarantined
        lines += [f"{site}: {count} excluded: {reason}" for reason, count in index.excluded.items()]
        lines += [f"{site}: {count} frames left out: {reason}" for reason, count in index.skipped_frames.items()]
        if index.unnamed:
            lines.append(
                f"{site}: {index.unnamed} images without a patient: each counts as one; where a patient is the privacy "
                "unit, they are left out"
            )
        lines += [f"{site}: {index.duplicates} copies of other files"] if index.duplicates else []
        lines += [f"{site}: {path}: {reason}" for path, reason in quarantined[:most]]
        if len(quarantined) > most:
            lines.append(f"{site}: and {len(quarantined) - most} more")
    return lines


def rounds_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return each committed round's loss, effective rank (the lowest of the sites), sites, time and bytes.

    Where sites withhold figures, the table says so; where they spend privacy, it has the largest epsilon.
    """
    private = any(site["epsilon"] is not None for record in records for site in record["sites"].values())
    figures = ("epsilon",) if private else ("loss", "rank", "images")
    made = table("Rounds", "round", *figures, "sites", "seconds", "MB received")
    for number, record in enumerate(records, start=1):
        sites = record["sites"].values()
        shares = (None if site["loss"] is None else site["weight"] * site["loss"] for site in sites)
        shown = {
            "epsilon": upward(max((site["epsilon"] for site in sites), default=0.0)) if private else "",
            "loss": told(shares, sum, ".4f"),
            "rank": told((site["effective_rank"] for site in sites), min, ".1f"),
            "images": told((site["images"] for site in sites), sum, ","),
        }
        seconds, megabytes = f"{record['seconds']:.1f}", f"{record['bytes_received'] / 1e6:.1f}"
        made.add_row(str(number), *(shown[name] for name in figures), str(len(sites)), seconds, megabytes)
    return made
