"""What a person reads of registered backbones: the list of them, and what the gate found. Loads no torch."""

import json
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from wardround.privacy.accounting import upward
from wardround.registry.mlflow_store import ModelRow
from wardround.registry.promotion import Examined


def models_table(rows: Sequence[ModelRow]) -> Table:
    """Return the registered backbones: which is the champion, how it probes beside the floors, what it promises."""
    made = Table("backbone", title="Registered backbones", title_justify="left", title_style="bold", box=None)
    made.padding, made.pad_edge, made.columns[0].overflow = (0, 2, 1, 0), False, "fold"
    for name in ("aliases", "linear probe"):  # walls and more columns would fold these in a terminal of 80
        made.add_column(name, no_wrap=True)
    made.add_column("privacy", min_width=16)
    made.add_column("released", no_wrap=True)
    for row in rows:
        probe: dict[str, float] = json.loads(row.tags.get("probe", "{}"))
        cells = [
            f"{row.name}/{row.version}" + ("" if row.round is None else f"\nround {row.round}"),
            "\n".join(row.aliases),
            scores(probe) if probe else "not measured",
            row.tags.get("privacy", "not said"),
            f"{row.when:%Y-%m-%d}\n{'' if 'signed_by' in row.tags else 'not '}signed",
        ]
        made.add_row(*map(escape, cells))
    return made


def gate_table(examined: Examined) -> Table:
    """Return each condition of the gate: found against expected."""
    title = f"{examined.name}/{examined.version} at the gate to {examined.name}@champion"
    champion = f"the champion is version {examined.champion}" if examined.champion else "there is no champion yet"
    made = Table(
        title=escape(title), caption=champion, title_justify="left", caption_justify="left", title_style="bold"
    )
    for name in ("condition", "found", "expected", ""):
        made.add_column(name, overflow="fold")
    for one in examined.conditions:
        found = one.found if isinstance(one.found, str) else _epsilons(one.found)
        verdict = "[green]met[/]" if one.met else "[bold red]not met[/]"
        made.add_row(one.what, escape(found), escape(one.expected), verdict)
    return made


def scores(probe: Mapping[str, float]) -> str:
    """Return a probe's score, its floors below.

    >>> scores({"backbone": 0.8127, "random": 0.64, "raw pixels": 0.7})
    '0.813\\nrandom 0.640\\nraw pixels 0.700'
    """
    floors = [f"{arm} {value:.3f}" for arm, value in probe.items() if arm != "backbone"]
    return "\n".join([f"{probe['backbone']:.3f}", *floors])


def _epsilons(by_site: Mapping[str, float]) -> str:
    return ", ".join(f"{site} {upward(epsilon)}" for site, epsilon in sorted(by_site.items()))
