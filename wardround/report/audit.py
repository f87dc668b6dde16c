"""The site's audit log as a person reads it, in a terminal of 80 columns."""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from wardround.privacy.accounting import upward
from wardround.update import printable

_FORM = "{:>4} {:<8} {:<3} {:<17} {:>5} {:<8} {:>11} {:<8} {:>7}"
_HEAD = ("row", "UTC", "", "kind", "round", "protocol", "bytes", "SHA-256", "epsilon")
_EPSILON = "epsilon: spent in that federation by then, under adding or removing one of its\nunits, at its own delta"


def log_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return messages, oldest first, below a line for each day and peer; hashes by their start.

    A row has the fields of client.audit's Row and Crossing.
    """
    lines = ["Audit log", _FORM.format(*_HEAD)]
    for (day, peer), group in groupby(rows, lambda row: (row["time"].partition("T")[0], row["peer"])):
        lines.append(f"{day}, with {_named(peer)}")
        lines += [_line(row) for row in group]
    return [*lines, _EPSILON]


def audit_json(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return messages as a JSON list, for machines, with the whole of every hash."""
    return json.dumps(list(rows), indent=1)


def _named(peer: str) -> str:
    """Return whom messages came from and went to.

    >>> _named("SHA256:uNiVztksCsDhcc0u9e8BgrJXVGLXYT8"), _named("")
    ('the coordinator of key uNiVztks', 'nobody known: the coordinator had not signed it')
    """
    if not peer:
        return "nobody known: the coordinator had not signed it"
    return f"the coordinator of key {peer[7:15]}" if peer.startswith("SHA256:") else printable(peer)


def _line(row: Mapping[str, Any]) -> str:
    time, epsilon = row["time"].partition("T")[2].removesuffix("Z"), row["epsilon"]
    spent = "" if epsilon is None else upward(epsilon)
    what = (row["direction"], printable(row["kind"]), row["round"] or "", row["protocol"][:8])
    return _FORM.format(row["seq"], time, *what, f"{row['bytes']:,}", row["sha256"][:8], spent).rstrip()
