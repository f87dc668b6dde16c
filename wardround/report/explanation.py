"""A picture of where a probe's answers come from."""

from pathlib import Path

from matplotlib.figure import Figure

from wardround.data import LabelledImages
from wardround.probe.explanation import Explanation

_COLUMNS = 4


def draw_explanation(found: Explanation, images: LabelledImages, path: Path) -> None:
    """Write a PNG of pairs: a test image with its true label, and the same with what its answer comes from."""
    lines = -(-len(found.places) // _COLUMNS)
    figure = Figure(figsize=(3.0 * _COLUMNS, 1.75 * lines + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(lines, 2 * _COLUMNS, squeeze=False).reshape(-1, 2)
    for axis in axes.flat:
        axis.axis("off")
    truth = images.one_hot
    for number, ((left, right), place) in enumerate(zip(axes, found.places, strict=False)):
        names = [name for name, has in zip(images.classes, truth[place], strict=True) if has]
        answer = images.classes[found.answers[number]]
        for axis in (left, right):
            axis.imshow(images.images[place].transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        right.imshow(found.maps[number], cmap="inferno", vmin=0, vmax=1, alpha=0.55)
        left.set_title(" + ".join(names) or "none", fontsize=7)
        wrong = {} if answer in names else {"color": "firebrick", "weight": "bold"}
        right.set_title(f"{'' if not wrong else '✗ '}{answer} {found.probabilities[number]:.2f}", fontsize=7, **wrong)
    figure.suptitle(f"Where the linear probe's answer comes from: {found.way}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
