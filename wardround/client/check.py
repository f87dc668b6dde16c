"""`wardround site check`: all that a site can know of itself before a round, each by a small function."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from wardround.client import approval, policy
from wardround.client.app import machine
from wardround.client.audit import AuditLog
from wardround.client.charge import ledger_of
from wardround.client.journal import WRITTEN
from wardround.client.kit import check_folders, check_kit
from wardround.client.reach import ending, ends, reach
from wardround.config import FederationConfig, SiteConfig
from wardround.config.privacy import UnitPrivacyConfig
from wardround.data import SiteImages, open_site
from wardround.data.burnt import looks_burnt
from wardround.data.labels import chosen, read_rows
from wardround.data.listing import shown
from wardround.data.patients import read_opt_outs, read_salt
from wardround.data.readers import quiet, read_frames
from wardround.errors import ConfigError, WardroundError
from wardround.plan import Plan, cost, resolve
from wardround.privacy.accounting import mechanism, rounds_left
from wardround.report.ledger import ledger_lines
from wardround.report.sheet import draw_sheet
from wardround.ssl.draws import generator

Severity = Literal["well", "warning", "problem"]
SEVERITIES: tuple[Severity, ...] = ("well", "warning", "problem")

_LOOKED_AT = 100  # files, for text in their pixels: some seconds of a CPU
_COLUMNS, _ROWS = 8, 4  # of the contact sheet
NO_IMAGE = ("no image", "not an image")  # how the reasons begin for what was never one: reports, plans, tables
_SKEW = 300.0  # seconds, after which SuperLink takes a signature for an old one


class Finding(NamedTuple):
    """One line of the summary."""

    what: str
    found: str
    severity: Severity = "well"
    remedy: str = ""


def check(site: SiteConfig, path: Path, config: FederationConfig) -> tuple[list[Finding], SiteImages | None]:
    """Return what was found, and the images where there are any; `path` is that of site.toml."""
    found: list[Finding] = []
    images: SiteImages | None = None
    _told(found, "kit", _kit, site, path)
    _told(found, "folders", _folders, site, path)
    _told(found, "scores", _scores, site)
    _told(found, "connection", _connection, site)
    with _problem(found, "images"):
        images = open_site(site, config.data)
        found += _images(images)
        _told(found, "opt-outs", _opt_outs, site, images)
        _told(found, "text in the pixels", _text, site, images)
    if (why := approval.out_of_reach(config)) is not None:
        remedy = f"put them there, and check again; or {approval.BY_DIGEST}"
        found.append(Finding("federation", f"its initial weights are not here: {why}", "warning", remedy))
    else:
        with _problem(found, "federation"):
            plan = resolve(config)
            _told(found, "approval", _approval, site, plan)
            _told(found, "time", _time, site, plan)
            _told(found, "disk", _disk, site, plan, images)
            _told(found, "minimum", _minimum, site, plan, images)
            _told(found, "ledger", _ledger, site, plan)
    _told(found, "audit log", _log, site)
    return found, images


def to_do(found: list[Finding]) -> list[str]:
    """Return what each finding asks for.

    >>> to_do([Finding("kit", "whole", remedy="compare it"), Finding("images", "12")])
    ['kit: compare it']
    """
    return [f"{one.what}: {one.remedy}" for one in found if one.remedy]


def worst(found: list[Finding]) -> Severity:
    """Return the gravest severity.

    >>> worst([Finding("a", ""), Finding("b", "", "problem"), Finding("c", "", "warning")])
    'problem'
    """
    return max((one.severity for one in found), key=SEVERITIES.index, default="well")


def raise_for(found: list[Finding]) -> None:
    """Raise ConfigError, with their names, where there are problems."""
    if bad := [one.what for one in found if one.severity == "problem"]:
        raise ConfigError(f"{len(bad)} problem{'s' if len(bad) > 1 else ''} at this site: {', '.join(bad)}; see above.")


@contextmanager
def _problem(found: list[Finding], what: str) -> Iterator[None]:
    """Make an error that a person can mend a finding."""
    try:
        yield
    except (WardroundError, OSError) as error:
        found.append(Finding(what, str(error), "problem"))


def _told(found: list[Finding], what: str, look: Callable[..., list[Finding]], *at: Any) -> None:
    with _problem(found, what):
        found += look(*at)


def _kit(site: SiteConfig, path: Path) -> list[Finding]:
    if site.coordinator is None:
        return [Finding("kit", "none: site.toml has no [coordinator]", "warning", "take that section from the kit")]
    key = check_kit(site, path)
    remedy = f"the coordinator's key is {key}; compare it by telephone"
    return [Finding("kit", "whole, as the coordinator signed it", remedy=remedy)]


def _folders(site: SiteConfig, path: Path) -> list[Finding]:
    check_folders(site, path)
    return [Finding("folders", "the images' is there, and the work folder can be written")]


def _scores(site: SiteConfig) -> list[Finding]:
    """Say how many labelled images the site lends. Raises DataError where their table is none to measure on."""
    if site.evaluation is None:
        return []
    lent, folder = site.evaluation, site.evaluation.folder
    if not (folder / "labels.csv").is_file():
        remedy = "correct [evaluation] folder; in a container it is /data/labelled, for which LABELLED stands in .env"
        return [Finding("scores", f"{folder} has no labels.csv", "problem", remedy)]
    rows = chosen(read_rows(folder, lent.label), folder, lent.site, ("train", "val", "test"))
    return [Finding("scores", f"{len(rows):,} labelled images to measure them on")]


def _connection(site: SiteConfig) -> list[Finding]:
    """Say whether the coordinator answers, how far the clocks are apart, and when certificates end."""
    if site.coordinator is None:
        return []
    made, shown, address = [], None, site.coordinator.address
    try:
        seen = reach(site.coordinator)
        shown = seen.certificate
        made.append(Finding("connection", f"{address} answers, and its certificate holds"))
        made += [] if seen.ahead is None else [_clock(seen.ahead)]
    except ConnectionRefusedError as error:
        made.append(Finding("connection", str(error), "problem", "ask the coordinator"))
    except ConnectionError as error:  # it may not have begun yet
        remedy = (
            "a site keeps trying; if the coordinator is up, compare [coordinator] address, and have it allowed outwards"
        )
        made.append(Finding("connection", str(error), "warning", remedy))
    dates = ends(site.coordinator, shown)
    told = "; ".join(f"{name} ends on {end:%Y-%m-%d}" for name, end in dates.items())
    soon = "; ".join(ending(dates))
    return [*made, Finding("certificates", soon or told, "warning" if soon else "well")]


def _clock(ahead: float) -> Finding:
    said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if abs(ahead) <= _SKEW:
        return Finding("clock", said)
    return Finding("clock", said, "warning", "set this machine's clock; until then the coordinator's is used")


def _images(images: SiteImages) -> list[Finding]:
    index = images.index
    kinds = ", ".join(f"{name} {count:,}" for name, count in index.modalities.items())
    found = [Finding("images", f"{images.num_images:,} images of {images.num_patients:,} patients; modality {kinds}")]
    others = sum(reason.startswith(NO_IMAGE) for _, reason in index.quarantined)
    counts = {
        "read": index.read,
        "copies of others": index.duplicates,
        "no images": others,
        "opted out": index.opted_out,
        "excluded": sum(index.excluded.values()),
    }
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    found.append(Finding("files", f"{index.files:,} files: {said}"))
    if unread := len(index.quarantined) - others:
        remedy = "mend or remove them; each is named below"
        found.append(Finding("unreadable", f"{unread:,} of the files", "warning", remedy))
    if index.unnamed:
        remedy = "where a patient is the privacy unit they are left out; name patients in the files or in labels.csv"
        found.append(Finding("nobody's", f"{index.unnamed:,} images say of no patient", "warning", remedy))
    return found


def _opt_outs(site: SiteConfig, images: SiteImages) -> list[Finding]:
    """Say whether the opt-out list leaves anything out: with a name beside it, an identifier is another one."""
    if site.images.opt_out is None:
        return []
    listed, files = len(read_opt_outs(site.images.opt_out, site.name, read_salt(site.work))), images.index.opted_out
    if listed and not files and site.images.kind != "dicomweb":  # of whose server nothing of theirs is fetched
        remedy = "if one should be, look at the list: one PatientID a line, and nothing else on it"
        return [Finding("opt-outs", f"{listed:,} lines, and no file here is of any of them", "warning", remedy)]
    return [Finding("opt-outs", f"{listed:,} lines, and {files:,} files are left out for them")]


def _text(site: SiteConfig, images: SiteImages) -> list[Finding]:
    """Say which files may show text, by their headers and by the looks of some, and draw the contact sheet."""
    files = sorted({origin.path for origin in images.origins})
    order = torch.randperm(len(files), generator=generator(site.name, "check"))[:_LOOKED_AT]
    looked = [files[place] for place in order.sort().values.tolist()]
    with quiet():
        suspects = [path for path in looked if looks_burnt(next(read_frames(path, [0], None)))]
    sheet = site.work / "check" / "contact-sheet.png"
    folder = site.images.folder
    flagged = [folder / name for name in images.index.burnt] if folder is not None else []
    _draw(images, [*flagged, *suspects], sheet)
    said = f"by header in {len(images.index.burnt):,} files, by its looks in {len(suspects)} of {len(looked)}"
    found = Finding("text in the pixels", said)
    if named := [*images.index.burnt, *map(str, suspects)]:
        remedy = f"a suspicion: look at the sheet; names in pixels are learnt like all else. First: {shown(named[0])}"
        found = Finding("text in the pixels", said, "warning", remedy)
    return [found, Finding("contact sheet", "some images as training sees them", remedy=f"look at {sheet}")]


def _draw(images: SiteImages, suspects: list[Path], sheet: Path) -> None:
    """Draw some images, and below them those that may show text; the picture is for the site alone."""
    drawn = torch.randperm(images.num_images, generator=generator("sheet"))[: _COLUMNS * _ROWS].sort().values.numpy()
    parts = {f"{row + 1}": drawn[row * _COLUMNS :][:_COLUMNS] for row in range(-(-len(drawn) // _COLUMNS))}
    wanted = set(suspects[:_COLUMNS])
    if wanted:
        parts["text?"] = np.array([row for row, one in enumerate(images.origins) if one.path in wanted])[:_COLUMNS]
    rows = {}
    for name, places in parts.items():
        pixels = torch.from_numpy(np.array(images.images[places])).float() / 255.0
        rows[name] = torch.cat([pixels, pixels.new_zeros((_COLUMNS - len(pixels), *pixels.shape[1:]))])
    draw_sheet(rows, sheet, "images as training sees them")
    sheet.chmod(0o600)


def _approval(site: SiteConfig, plan: Plan) -> list[Finding]:
    """Say whether this federation's rounds would be trained here."""
    short = plan.digest[:12]
    if (why := approval.unapproved(site, plan.protocol)) is not None:
        return [Finding("approval", f"{short} {why}", "warning", "wardround site approve SITE_TOML FEDERATION_TOML")]
    if objection := next(policy.objections(site, plan.protocol), None):
        return [Finding("approval", f"{short} is approved, and would be refused: {objection}", "problem")]
    return [Finding("approval", f"{short} is approved")]


def _time(site: SiteConfig, plan: Plan) -> list[Finding]:
    own, training = machine(site), plan.config.training
    seconds = cost(plan, machine=own).seconds_per_step * training.local_steps
    said = f"about {seconds:,.1f} s a round on {own.device}, beside decoding and transfer; {training.rounds:,} rounds"
    return [Finding("time", said)]


def _disk(site: SiteConfig, plan: Plan, images: SiteImages | None) -> list[Finding]:
    """Say whether the work folder has room for a round and for the cache to be written anew."""
    needed = WRITTEN * sum(array.nbytes for array in plan.state.values())
    needed += 0 if images is None else images.images.nbytes
    there = next(folder for folder in (site.work, *site.work.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    said = f"{free / 1e6:,.0f} MB are free, and a round with new images may take {needed / 1e6:,.0f} MB"
    lacks = ("problem", "make room, or set 'work' to another disk") if free < needed else ()
    return [Finding("disk", said, *lacks)]


def _minimum(site: SiteConfig, plan: Plan, images: SiteImages | None) -> list[Finding]:
    """Raise PolicyRefusal where the site's own minimum would refuse each round; else there is nothing to say."""
    if images is not None:
        policy.refuse_few(site, plan.protocol, images.num_images)
    return []


def _ledger(site: SiteConfig, plan: Plan) -> list[Finding]:
    """Say what is spent, and whether the federation's rounds fit below the ceiling."""
    ledger = ledger_of(site)
    rows, gaps = ledger.rows(), ledger.gaps()
    lines = ledger_lines(rows, gaps, site)
    if gaps:
        return [Finding("ledger", lines[0], "problem", "wardround site ledger recover SITE_TOML")]
    privacy, rounds = plan.config.privacy, plan.config.training.rounds
    if not isinstance(privacy, UnitPrivacyConfig):
        return [Finding("ledger", " ".join(lines) if rows else "empty, and this federation spends nothing of it")]
    if site.privacy is None or site.privacy.units is None:
        remedy = "add it with epsilon (the ceiling), delta and units"
        return [Finding("ledger", "site.toml has no [privacy] with units, so no round is trained", "problem", remedy)]
    spent = [row.mechanism for row in rows]
    left = rounds_left(spent, mechanism(plan.config, site.privacy.units), site.privacy.epsilon, site.privacy.delta)
    said = f"{left:,} rounds of this federation fit below epsilon = {site.privacy.epsilon:g}, of its {rounds:,}"
    done = sum(row.intent.protocol == plan.digest for row in rows)
    if left + done < rounds:
        return [
            Finding("ledger", said, "warning", "it stops before the last round; raise [privacy] epsilon, or do not")
        ]
    return [Finding("ledger", said)]


def _log(site: SiteConfig) -> list[Finding]:
    rows, _ = AuditLog(site.work).verified()
    return [Finding("audit log", f"{len(rows):,} messages, and the chain is whole")]
