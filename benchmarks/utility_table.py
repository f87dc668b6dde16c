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
SHOWN = tuple((probe, fraction) for probe in ("linear", "k-NN", "full") for fraction in reversed(FRACTIONS))
ARMS = ("federated", "central", "random")


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


def signed(value: float) -> str:
    """Return a number with its sign, without the zero before the point.

    >>> signed(0.25), signed(-1e-9)
    ('+.250', '+.000')
    """
    return f"{round(value, 3) + 0.0:+.3f}".replace("0.", ".", 1)


def interval(values: Sequence[float]) -> str:
    """Return a mean and half of its 95 % interval over the seeds (Student); of one seed the value alone.

    >>> interval([0.1, 0.2, 0.3]), interval([0.1])
    ('+.200 ± .248', '+.100')
    """
    mean = signed(statistics.mean(values))
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


@dataclass(frozen=True)
class Question:
    """What is asked of a federation, its answer seed by seed, and from where on that is good enough."""

    text: str
    values: list[float]
    least: float | None = None  # the goal: the mean over the seeds reaches it
    note: str = ""

    @property
    def answer(self) -> str:
        """The mean with its interval, and by how much a goal is met or missed.

        >>> Question("a less b", [0.25, 0.25], least=-0.01).answer
        '+.250 ± .000 (goal -.010: met)'
        """
        if not self.values:
            return self.note
        told = interval(self.values) + self.note
        if self.least is None:
            return told
        short = round(self.least - statistics.mean(self.values), 6)
        return f"{told} (goal {signed(self.least)}: {'met' if short <= 0.0 else f'**missed** by {short:.3f}'})"


def questions(by_arm: dict[str, dict[int, Scored]], partition: str) -> list[Question]:
    """Return what a federation is asked: of the linear probe's AUC at all labels, where nothing else is said."""
    asked: list[Question] = []

    def ask(
        text: str, first: str, other: str, least: float | None = None, key: tuple[str, float] = ("linear", 1.0)
    ) -> None:
        seeds = [seed for seed in by_arm.get(first, {}) if seed in by_arm.get(other, {})]
        pairs = [(by_arm[first][seed].auc(*key), by_arm[other][seed].auc(*key)) for seed in seeds]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        if known:
            asked.append(Question(text, known, least))

    ask("federated less random", "federated", "random")
    ask("central less random", "central", "random")
    ask("federated less central", "federated", "central", -0.01 if partition == "iid" else None)
    if partition != "iid":
        asked += retained(by_arm)
    for how, least in (("alone", 0.0), ("in the same time", None)):
        sites = [arm for arm in by_arm if arm.endswith(f" {how}")]  # the largest first
        asked += joining(by_arm, sites, how)
        if sites:
            largest = f"federated less the largest site {how} ({sites[0].removesuffix(f' {how}')})"
            ask(largest, "federated", sites[0], least)
    for fraction, least in ((0.01, 0.05), (0.1, 0.02), (1.0, None)):
        text = f"fine-tuned at {fraction:.0%} of labels: federated less from scratch"
        ask(text, "federated", "random", least, ("full", fraction))
    ask("int8 less federated", "int8", "federated", -0.005)
    ask("one site missing less federated", "one site missing", "federated", -0.01)
    ask("patient-level DP less random, which it starts from", "patient-level DP", "random", 0.0)
    return asked


def joining(by_arm: dict[str, dict[int, Scored]], sites: list[str], how: str) -> list[Question]:
    """Return what a federation has over the mean of its sites by themselves; of one site there is no mean."""
    seeds = [seed for seed in by_arm.get("federated", {}) if all(seed in by_arm[site] for site in sites)]
    if len(sites) < 2 or not seeds:
        return []
    means = [statistics.mean(linear(by_arm[site][seed]) for site in sites) for seed in seeds]
    gains = [linear(by_arm["federated"][seed]) - mean for seed, mean in zip(seeds, means, strict=True)]
    return [Question(f"gain of joining: federated less the mean of {len(sites)} sites {how}", gains, 0.03)]


def retained(by_arm: dict[str, dict[int, Scored]]) -> list[Question]:
    """Return how much of what central training has, and of what it gains over random, the federation keeps."""
    federated, central, random = ({s: linear(c) for s, c in by_arm.get(a, {}).items()} for a in ARMS)
    seeds = [seed for seed in federated if seed in central and seed in random]
    if not seeds:
        return []
    gaining = [seed for seed in seeds if central[seed] > random[seed]]
    kept = [(federated[seed] - random[seed]) / (central[seed] - random[seed]) for seed in gaining]
    lost = len(seeds) - len(gaining)
    note = f"{'; ' if kept else ''}{lost} seeds where central gains nothing" * bool(lost)
    return [
        Question("federated over central", [federated[seed] / central[seed] for seed in seeds], 0.95),
        Question("gain retained: (federated - random) / (central - random)", kept, 0.8, note),
    ]


def linear(scored: Scored) -> float:
    """Return the linear probe's AUC at all labels."""
    found = scored.auc("linear", 1.0)
    assert found is not None, "every arm is probed"
    return found


def tables(scored: Sequence[Scored]) -> Iterator[Table]:
    """Give a table a method and partition, and below it what the federation was for."""
    for method, partition, by_arm in groups(scored):
        made = Table(title=f"{method}, {partition}: test AUC, mean ± sd over seeds", title_justify="left")
        for column in ("arm", *(head(*key) for key in measured(by_arm))):
            made.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
        for line in lines(by_arm):
            made.add_row(*line)
        made.caption = "\n".join(f"{one.text}: {one.answer}" for one in questions(by_arm, partition)).replace("**", "")
        made.caption_justify = "left"
        yield made


def head(probe: str, fraction: float) -> str:
    """Return a column's heading."""
    return f"{'fine-tuned' if probe == 'full' else probe} {fraction:.0%}"


def measured(by_arm: dict[str, dict[int, Scored]]) -> list[tuple[str, float]]:
    """Return which scores any arm has."""
    scored = [one for cells in by_arm.values() for one in cells.values()]
    return [key for key in SHOWN if any(one.auc(*key) is not None for one in scored)]


def lines(by_arm: dict[str, dict[int, Scored]]) -> Iterator[list[str]]:
    """Give a line an arm."""
    for arm, cells in by_arm.items():
        yield [arm, *(mean_and_sd([one.auc(*key) for one in cells.values()]) for key in measured(by_arm))]


def markdown(scored: Sequence[Scored], said: dict[str, Any]) -> str:
    """Return the tables for a page."""
    machine = said["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}"
    parts = [f"`python {said['command']}`, {said['day']}: {where}.\n"]
    for method, partition, by_arm in groups(scored):
        seeds = len({seed for cells in by_arm.values() for seed in cells})
        parts.append(f"## {method}, {partition}: test AUC over {seeds} seeds\n")
        columns = ("arm", *(head(*key) for key in measured(by_arm)))
        parts.append("| " + " | ".join(columns) + " |")
        parts.append("|---" * len(columns) + "|")
        parts += ["| " + " | ".join(line) + " |" for line in lines(by_arm)]
        asked = questions(by_arm, partition)
        parts.append("\n" + "\n".join(f"- {one.text}: {one.answer}" for one in asked) + "\n")
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
