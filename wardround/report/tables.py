"""The tables that commands print."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from wardround.data import SiteImages
from wardround.plan import Cost, Plan
from wardround.registry.mlflow_store import ModelRow


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
    rows = {
        "protocol digest": plan.digest,
        "backbone": f"{config.backbone.name}, {cost.backbone_parameters:,} parameters",
        "method": f"{config.method.name}, head {cost.head_parameters:,} parameters (thrown away)",
        "loss": f"couples images: {cost.coupling}" if cost.coupling else "decomposes over images, so over patients",
        "images": f"{' x '.join(str(edge) for edge in config.data.shape[1:])}, {config.data.channels} channel(s)",
        "rounds": f"{training.rounds} of {training.local_steps} local steps",
        "batch": f"{training.batch_size} images, {training.precision}",
        "bytes a round and site": f"{cost.bytes_per_message:,} down, {cost.bytes_per_message:,} up",
        "memory at a site": f"about {cost.memory_bytes / 2**20:,.0f} MiB beside Python and its libraries",
        "time at a site": f"about {span} of steps in all on this machine ({cost.seconds_per_step:.2f} s a step)",
        "sites": ", ".join(sorted(config.membership.sites)) or "whoever is in the data or connects",
        "differential privacy": "none: the coordinator may be able to reconstruct images",
    }
    made = table(f"{config.name}", "what", "value")
    made.columns[1].justify, made.columns[1].overflow = "left", "fold"  # a digest is to be copied whole
    for name, value in rows.items():
        made.add_row(name, escape(value))  # a section's name in brackets is no markup
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
        lines += [f"{site}: {index.duplicates} copies of other files"] if index.duplicates else []
        lines += [f"{site}: {path}: {reason}" for path, reason in quarantined[:most]]
        if len(quarantined) > most:
            lines.append(f"{site}: and {len(quarantined) - most} more")
    return lines


def rounds_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return each committed round's loss, effective rank (the lowest of the sites), sites, time and bytes."""
    made = table("Rounds", "round", "loss", "rank", "sites", "images", "seconds", "MB received")
    for number, record in enumerate(records, start=1):
        sites = record["sites"].values()
        loss = sum(site["weight"] * site["loss"] for site in sites)
        images = sum(site["images"] for site in sites)
        megabytes = record["bytes_received"] / 1e6
        rank = min(site["effective_rank"] for site in sites)
        figures = (f"{loss:.4f}", f"{rank:.1f}", str(len(sites)), f"{images:,}")
        made.add_row(str(number), *figures, f"{record['seconds']:.1f}", f"{megabytes:.1f}")
    return made


def models_table(rows: Sequence[ModelRow]) -> Table:
    """Return the registered backbones."""
    made = table("Registered backbones", "name", "version", "aliases", "registered (UTC)", "round", "loss", "digest")
    made.columns[0].overflow = "fold"  # a name is to be copied whole
    for row in rows:
        loss = f"{row.metrics['loss']:.4f}" if "loss" in row.metrics else ""
        when = f"{row.when:%Y-%m-%d %H:%M}"
        round = "" if row.round is None else str(row.round)
        made.add_row(row.name, row.version, ", ".join(row.aliases), when, round, loss, row.digest[:12])
    return made
