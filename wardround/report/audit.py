"""The site's audit log as a person reads it."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from wardround.privacy.accounting import upward

_EPSILON = "epsilon: spent in that federation by then, under adding or removing one of its units, at its own delta"


def audit_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return messages, oldest first; a row has the fields of client.audit's Row and Crossing, hashes by their start."""
    made = Table(title="Audit log", title_justify="left", title_style="bold", header_style="bold")
    made.caption, made.caption_justify = _EPSILON, "left"
    for name in ("row", "time (UTC)", "", "kind", "round", "protocol", "bytes", "SHA-256", "epsilon", "peer"):
        right = name in ("row", "round", "bytes", "epsilon")
        made.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(
            str(row["seq"]),
            row["time"].replace("T", " ").removesuffix("Z"),
            row["direction"],
            escape(row["kind"]),
            str(row["round"] or ""),
            row["protocol"][:8],
            f"{row['bytes']:,}",
            row["sha256"][:8],
            "" if row["epsilon"] is None else upward(row["epsilon"]),
            row["peer"].removeprefix("SHA256:")[:8] or "unknown",
        )
    return made


def audit_json(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return messages as a JSON list, for machines, with the whole of every hash."""
    return json.dumps(list(rows), indent=1)
