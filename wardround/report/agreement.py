"""What a person reads before a protocol is approved at a site: in plain words, what it does, takes and gives."""

import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import date

import numpy as np
from rich.markup import escape
from rich.table import Table

from wardround.config import Protocol, SiteConfig
from wardround.config.privacy import NoPrivacyConfig, UnitPrivacyConfig
from wardround.encoding import encoded_layout
from wardround.plan import architecture
from wardround.privacy.accounting import Mechanism, epsilon, mechanism, upward
from wardround.privacy.statement import statement
from wardround.report.tables import table
from wardround.update import MEASURED, Declared, Layout, printable, withholds

METHODS = {
    "mae": "learns to fill in hidden parts of an image",
    "ijepa": "learns to predict the features of hidden parts of an image",
    "simclr": "learns which two altered copies show the same image",
    "moco": "learns which two altered copies show the same image, beside a slow copy of itself",
    "byol": "learns to give two altered copies of an image the same features",
    "simsiam": "learns to give two altered copies of an image the same features",
    "dino": "learns to sort altered copies of an image alike, beside a slow copy of itself",
    "vicreg": "learns to give two altered copies of an image the same features, and all images different ones",
}
_CORRECTED = {"scaffold": 2}  # how many numbers cross for each of the network's


def agreement_table(protocol: Protocol, site: SiteConfig, spent: Sequence[Mechanism]) -> Table:
    """Return what a protocol means for a site; `spent` is all that its ledger was charged.

    Texts of the protocol come from outside: they are shown without what could move a cursor.
    Raises ConfigError where its network cannot be built here.
    """
    training, shape = protocol.training, architecture(protocol)
    part = "patients, drawn by chance," if protocol.privacy.unit == "patient" else "images"
    rows = {
        "protocol digest": protocol.digest(),
        "what it does": f"{protocol.method.name}: {METHODS.get(protocol.method.name, 'a method')}; no labels are used",
        "backbone": f"{protocol.backbone.name}; {_count(shape):,} numbers travel, heads that are thrown away included",
        "how long": f"{training.rounds:,} rounds of {training.local_steps:,} local steps of {training.batch_size:,} "
        f"{part} each: {training.total_steps:,} steps",
        "which images": f"{_criteria(protocol)}; never those of patients on this site's opt-out list",
        "what comes in": f"at most {_bytes(protocol, shape, whole=True):,} bytes a round",
        "what leaves": f"at most {_bytes(protocol, shape):,} bytes a round: how the network's numbers changed; and the "
        f"figures {', '.join(_figures(protocol))}",
        "what never leaves": "images, file names, patients' names or numbers, DICOM tags",
        "differential privacy": statement(protocol.privacy, training.rounds, site.name),
        "this site's ledger": _ledger(protocol, site, spent),
        "what it costs": f"{training.total_steps * training.batch_size:,} images forth and back, and about "
        f"{4 * 4 * _count(shape) / 2**20:,.0f} MiB of memory beside what a batch takes; 'wardround site check' "
        "measures a round's time",
        "updates are joined by": f"{protocol.aggregation.rule}, at the coordinator",
    }
    made = table(f"Federation '{printable(protocol.name)}'", "what", "value")
    made.columns[1].justify, made.columns[1].overflow = "left", "fold"
    for name, value in rows.items():
        made.add_row(name, escape(printable(value)))
    return made


def _figures(protocol: Protocol) -> list[str]:
    """Return the declared figures that leave with an update, in the words of the allow-list."""
    names = {field.name for field in fields(Declared)}
    if withholds(protocol.privacy):
        names -= set(MEASURED)
    if not isinstance(protocol.privacy, UnitPrivacyConfig):
        names -= {"units", "epsilon", "ledger"}
    return [field.name for field in fields(Declared) if field.name in names]


def _ledger(protocol: Protocol, site: SiteConfig, spent: Sequence[Mechanism]) -> str:
    """Return where the site's ledger would stand after all rounds, each trained once."""
    privacy, terms = protocol.privacy, site.privacy
    if isinstance(privacy, NoPrivacyConfig):
        return "is not charged: nothing bounds what an update tells of an image"
    if not isinstance(privacy, UnitPrivacyConfig):
        return "is not charged: it counts patients or images, and the unit is the whole site"
    if terms is None or terms.units is None:
        return f"cannot be charged: site.toml has no [privacy] with epsilon, delta and units ({privacy.unit}s)"
    after = epsilon([*spent, mechanism(protocol, terms.units).times(protocol.training.rounds)], terms.delta)
    before = epsilon(spent, terms.delta) if spent else 0.0
    verdict = "" if after <= terms.epsilon else ": it would stop before the last round"
    return (
        f"epsilon {upward(before)} now, {upward(after)} after all rounds, at delta = {terms.delta:g}, by "
        f"{terms.units:,} declared {privacy.unit}s; this site's ceiling is {terms.epsilon:g}{verdict}"
    )


def _criteria(protocol: Protocol) -> str:
    """Return the inclusion criteria."""
    wanted = protocol.data.criteria
    said = [f"at least {wanted.min_side} pixels a side"]
    for what, values in (("modality", wanted.modality), ("body part", wanted.body_part), ("view", wanted.view)):
        said += [f"{what} {' or '.join(values)}"] if values else []
    if wanted.date_from or wanted.date_to:
        said.append(f"taken from {wanted.date_from or date.min} to {wanted.date_to or date.max}")
    if wanted.max_images_per_patient:
        said.append(f"at most {wanted.max_images_per_patient:,} a patient")
    return ", ".join(said)


def _bytes(protocol: Protocol, shape: Layout, whole: bool = False) -> int:
    """Return the bytes of an update, or of a whole state, before they are compressed."""
    crossing = shape if whole else encoded_layout(shape, protocol.encoding)
    size = sum(math.prod(dims) * np.dtype(dtype).itemsize for dims, dtype in crossing.values())
    return size * _CORRECTED.get(protocol.training.correction.name, 1)


def _count(shape: Layout) -> int:
    return sum(math.prod(dims) for dims, _ in shape.values())
