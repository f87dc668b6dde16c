"""What sites answered of a backbone on their own labels, as a person reads it."""

import numpy as np
from rich.markup import escape
from rich.table import Table

from wardround.probe.evaluation import cell
from wardround.probe.scores import Scores
from wardround.probe.site_scores import Asked, Figures
from wardround.report.tables import table

ARMS = ("backbone", "random", "raw pixels")


def asked_table(asked: Asked) -> Table:
    """Return a line a site and probe, each arm a column, and who said nothing and why."""
    title = f"Round {asked.round} at the sites, each on its own test images: balanced accuracy / AUC"
    made = table(title, "site, test images / patients", "probe", *ARMS)
    for column in made.columns[1:]:
        column.no_wrap = True
    for site, scores in sorted(asked.scores.items()):
        size = f"{scores.test_images:,} / {scores.test_patients:,}"
        made.add_row(escape(site), "k-NN", *(_shown(scores.nearest.get(arm)) for arm in ARMS))
        made.add_row(size, "linear", *(_shown(scores.linear.get(arm)) for arm in ARMS), end_section=True)
    lines = ["below, 95 % intervals over test patients (bootstrap)"]
    if asked.scores:
        means = {arm: _mean(asked, arm) for arm in ARMS}
        lines.append(
            "linear probe, mean over sites: "
            + ", ".join(f"{arm} {mean:.3f}" for arm, mean in means.items() if mean is not None)
        )
    lines += [f"{escape(site)} gave none: {escape(why)}" for site, why in sorted(asked.refused.items())]
    made.caption = "\n".join(lines)
    made.caption_justify = "left"
    return made


def _mean(asked: Asked, arm: str) -> float | None:
    """Return the mean balanced accuracy of an arm's linear probe over the sites that say one."""
    found = [scores.linear[arm].balanced_accuracy for scores in asked.scores.values() if arm in scores.linear]
    return float(np.mean(found)) if found else None


def _shown(figures: Figures | None) -> str:
    if figures is None:
        return ""
    rows = ((figures.balanced_accuracy, figures.auc), (figures.low, figures.auc_low), (figures.high, figures.auc_high))
    return cell(*(Scores(first, second, 0.0) for first, second in rows))
