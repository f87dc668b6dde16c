"""What a smaller backbone costs beside the one that it was made from."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from wardround.probe.evaluation import cell
from wardround.probe.scores import Scores
from wardround.report.tables import table


def compressed_table(found: Mapping[str, Any]) -> Table:
    """Return before and after of a compression, whose fields are those of downstream.compared.Compared."""
    probe = found["probe"]
    scored = ["linear probe\n{}\n/ {}".format(*probe["metrics"])] if probe else []
    made = table(f"Compressed by {found['by']}", "", "MB", "parameters", "GFLOPs", "ms an\nimage", *scored)
    for column in made.columns:  # in a terminal of 80 no number is cut
        column.no_wrap = True
    for arm in ("original", "compressed"):
        one = found[arm]
        cells = [f"{one['megabytes']:.2f}", f"{one['parameters']:,}", f"{one['gflops']:.3f}"]
        cells.append(f"{one['milliseconds']:.2f}")
        made.add_row(arm, *cells, *([_score(**probe[arm])] if probe else []))
    lines = [
        f"on {found['compared_on']} images of patients that it was not made with: least cosine to the original's "
        f"features {found['least_cosine']:.4f}, {found['explained']:.1%} of their variance explained",
        "one thread, batches of 16, by turns; one GFLOP is 10^9 multiplications and additions",
    ]
    if found["losses"]:
        lines.append("loss of distillation from {:.3f} to {:.3f}".format(*found["losses"]))
    if probe:
        lines.append(f"probe: {probe['labelled']:,} labelled images, {probe['tested']:,} test images; 95 % intervals")
    made.caption, made.caption_justify = "\n".join(lines), "left"
    return made


def _score(mean: Mapping[str, Any], low: Mapping[str, Any] | None, high: Mapping[str, Any] | None) -> str:
    """Return scores with their interval, of three that are plain values."""
    return cell(Scores(**mean), Scores(**low) if low else None, Scores(**high) if high else None)
