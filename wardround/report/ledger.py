"""The site's ledger as a person reads it.

Apart from `tables`, which loads torch with the plan: a look at the ledger takes a second or two.
"""

from collections.abc import Sequence

from rich.table import Table

from wardround.config import SiteConfig
from wardround.privacy.accounting import epsilon, rounds_left, upward
from wardround.privacy.ledger import Intent, Row


def ledger_table(rows: Sequence[Row]) -> Table:
    """Return every row, oldest first; the unit is one for all, and `ledger_lines` names it."""
    made = Table(title="Ledger", title_justify="left", title_style="bold", header_style="bold")
    for name in ("row", "day (UTC)", "federation", "round", "rate", "sigma", "steps", "kind"):
        made.add_column(name, justify="left" if name in ("row", "federation") else "right", overflow="fold")
    made.columns[1].no_wrap = True
    for row in rows:
        intent, each = row.intent, row.intent.mechanism
        kind = row.kind if row.count == 1 else f"{row.kind} ({row.count})"
        figures = (f"{each.rate:.4g}", f"{each.noise:g}", f"{row.mechanism.steps:,}")
        made.add_row(str(row.seq), row.time[:10], intent.federation, str(intent.round), *figures, kind)
    return made


def ledger_lines(rows: Sequence[Row], gaps: Sequence[Intent], site: SiteConfig) -> list[str]:
    """Return what is lacking, what is spent of the ceiling, and for how many rounds the rest lasts."""
    lacking = [
        f"The coordinator of '{gap.federation}' has seen {gap.seen.partition(':')[0]} rows, and not these: the ledger "
        "is older than what left this site. Until 'wardround site ledger recover', no private round is trained."
        for gap in gaps
    ]
    if not rows:
        none = " No private round is trained here: site.toml has no [privacy]." if site.privacy is None else ""
        return [*lacking, f"The ledger is empty.{none}"]
    last, spent, delta = rows[-1].intent, [row.mechanism for row in rows], rows[0].delta
    lines = [
        *lacking,
        f"The chain of {len(rows)} rows is whole.",
        f"Spent: epsilon = {upward(epsilon(spent, delta))} at delta = {delta:g}, add/remove one {last.unit}, "
        "over all federations in this ledger.",
    ]
    if site.privacy is None:
        return [*lines, "No ceiling: site.toml has no [privacy] section, and no private round is trained."]
    if site.privacy.delta != delta:
        lines.append(
            f"site.toml says delta = {site.privacy.delta:g}: until it is set back, no private round is trained."
        )
    left = rounds_left(spent, last.mechanism, site.privacy.epsilon, delta)
    lines.append(f"Ceiling: epsilon = {site.privacy.epsilon:g}; {left:,} more rounds like the last one fit below it.")
    return lines


def recovered_lines(written: Sequence[Row]) -> list[str]:
    """Return what a recovery charged, and as what."""
    if not written:
        return ["The ledger lacks nothing that a coordinator has named; nothing is charged."]
    return [
        f"Row {row.seq} charges {row.count} trainings of federation '{row.intent.federation}' that the ledger may lack "
        f"(its coordinator saw {row.intent.seen.partition(':')[0]} rows), each as {row.intent.mechanism.steps:,} steps "
        f"at rate {row.intent.mechanism.rate:.4g} and sigma {row.intent.mechanism.noise:g}."
        for row in written
    ]
