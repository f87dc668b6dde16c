"""What the cells of benchmarks/utility.py come to: a table a method and partition, Markdown, and a figure."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from scipy.stats import t

from wardround.probe.evaluation import Evaluation

FRACTIONS = (0.01, 0.1, 1.0)
SHOWN = (("linear", 1.0), ("linear", 0.1), ("linear", 0.01), ("k-NN", 1.0), ("full", 0.1), ("full", 0.01))


@dataclass(frozen=True)
class Scored:
    """A cell and its scores."""

    method: str
    partition: str
    arm: str
    seed: int
    found: Evaluation

    def auc(self, probe: str, fraction: float) -> float | None:
        """Return the mean AUC over the draws; training from scratch stands beside fine-tuning. None: not measured."""
        names = ("scratch" if self.arm == "random" and probe == "full" else probe, fraction)
        return next((row.mean.auc for row in self.found.rows if (row.probe, row.fraction) == names), None)

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        rows = [
            {
                "probe": row.probe,
                "fraction": row.fraction,
                "balanced_accuracy": row.mean.balanced_accuracy,
                "auc": row.mean.auc,
            }
            for row in self.found.rows
        ]
        return {"method": self.method, "partition": self.partition, "arm": self.arm, "seed": self.seed, "rows": rows}


def mean_and_sd(values: Sequence[float | None]) -> str:
    """Return a cell's text: the mean over the seeds, and their standard deviation.

    >>> mean_and_sd([0.5, 0.7]), mean_and_sd([0.25]), mean_and_sd([None])
    ('.600 ± .141', '.250', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.3f}".replace(" 0.", " .") if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}".replace("0.", ".", 1) + spread


def interval(values: Sequence[float]) -> str:
    """Return a mean and half of its 95 % interval over the seeds (Student); of one seed the value alone.

    >>> interval([0.1, 0.2, 0.3]), interval([0.1])
    ('+.200 ± .248', '+.100')
    """
    mean = f"{statistics.mean(values):+.3f}".replace("0.", ".", 1)
    if len(values) < 2:
        return mean
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.3f}".replace("± 0.", "± .")


def groups(scored: Sequence[Scored]) -> Iterator[tuple[str, str, dict[str, dict[int, Scored]]]]:
    """Give each method and partition with its cells by arm and seed."""
    for method, partition in dict.fromkeys((one.method, one.partition) for one in scored):
        by_arm: dict[str, dict[int, Scored]] = {}
        for one in scored:
            if (one.method, one.partition) == (method, partition):
                by_arm.setdefault(one.arm, {})[one.seed] = one
        yield method, partition, by_arm


def comparisons(by_arm: dict[str, dict[int, Scored]]) -> list[tuple[str, str]]:
    """Return what a federation asks of the linear probe at all labels: a question, and the answer over the seeds."""
    auc = {arm: {seed: one.auc("linear", 1.0) or 0.0 for seed, one in cells.items()} for arm, cells in by_arm.items()}
    alone = [arm for arm in auc if arm.endswith(" alone")]
    seeds = sorted(auc.get("federated", {}))
    asked: list[tuple[str, str]] = []

    def ask(question: str, other: str, first: str = "federated") -> None:
        if other in auc and first in auc:
            asked.append((question, interval([auc[first][seed] - auc[other][seed] for seed in seeds])))

    ask("federated less random", "random")
    ask("federated less central", "central")
    if alone and seeds:
        local = [statistics.mean(auc[arm][seed] for arm in alone) for seed in seeds]
        gains = [auc["federated"][seed] - mean for seed, mean in zip(seeds, local, strict=True)]
        asked.append(("gain of joining: federated less the mean of the sites alone", interval(gains)))
    ask("int8 less federated", "federated", "int8")
    ask("one site missing less federated", "federated", "one site missing")
    ask("patient-level DP less random, which it starts from", "random", "patient-level DP")
    if "central" in auc and "random" in auc and seeds:
        kept = [
            (auc["federated"][seed] - auc["random"][seed]) / (auc["central"][seed] - auc["random"][seed])
            for seed in seeds
            if auc["central"][seed] > auc["random"][seed]
        ]
        worthless = len(seeds) - len(kept)
        text = interval(kept) if kept else "not defined"
        asked.append(
            (
                "gain retained: (federated - random) / (central - random)",
                text + f"; {worthless} seeds without a gain" * bool(worthless),
            )
        )
    return asked


def tables(scored: Sequence[Scored]) -> Iterator[Table]:
    """Give a table a method and partition, and below it what the federation was for."""
    for method, partition, by_arm in groups(scored):
        made = Table(title=f"{method}, {partition}: test AUC, mean ± sd over seeds", title_justify="left")
        for column in ("arm", *(head(*key) for key in SHOWN)):
            made.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
        for line in lines(by_arm):
            made.add_row(*line)
        made.caption = "\n".join(f"{question}: {answer}" for question, answer in comparisons(by_arm))
        made.caption_justify = "left"
        yield made


def head(probe: str, fraction: float) -> str:
    """Return a column's heading."""
    return f"{'fine-tuned' if probe == 'full' else probe} {fraction:.0%}"


def lines(by_arm: dict[str, dict[int, Scored]]) -> Iterator[list[str]]:
    """Give a line an arm."""
    for arm, cells in by_arm.items():
        yield [arm, *(mean_and_sd([one.auc(*key) for one in cells.values()]) for key in SHOWN)]


def markdown(scored: Sequence[Scored], said: dict[str, Any]) -> str:
    """Return the tables for a page."""
    machine = said["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}"
    parts = [f"`python {said['command']}`, {said['day']}: {where}.\n"]
    for method, partition, by_arm in groups(scored):
        seeds = len({seed for cells in by_arm.values() for seed in cells})
        parts.append(f"## {method}, {partition}: test AUC over {seeds} seeds\n")
        parts.append("| " + " | ".join(("arm", *(head(*key) for key in SHOWN))) + " |")
        parts.append("|---" * (1 + len(SHOWN)) + "|")
        parts += ["| " + " | ".join(line) + " |" for line in lines(by_arm)]
        parts.append("\n" + "\n".join(f"- {question}: {answer}" for question, answer in comparisons(by_arm)) + "\n")
    return "\n".join(parts)


def draw(scored: Sequence[Scored], path: Path) -> None:
    """Write a figure: an arm a line, linear probes at 1, 10 and 100 % of the labels, each seed a dot."""
    found = list(groups(scored))
    figure = Figure(figsize=(5.2 * len(found), 5), layout="constrained")
    for place, (method, partition, by_arm) in enumerate(found, start=1):
        axes = figure.add_subplot(1, len(found), place)
        names = list(by_arm)
        for fraction, colour in zip(FRACTIONS, ("#9ecae1", "#4292c6", "#08306b"), strict=True):
            dots = [(one.auc("linear", fraction), names.index(arm)) for arm in names for one in by_arm[arm].values()]
            axes.plot(*zip(*dots, strict=True), "o", color=colour, label=f"{fraction:.0%} of labels", alpha=0.8)
        axes.set(title=f"{method}, {partition}", xlabel="test AUC of the linear probe", yticks=range(len(names)))
        axes.set_yticklabels(names)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend()
    figure.savefig(path, dpi=130)
