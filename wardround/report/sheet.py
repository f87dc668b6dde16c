"""A sheet of images: rows with a name each, the way all pictures of a round are laid out."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from wardround.registry.durable import new_file


def draw_sheet(rows: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Write a PNG of rows of as many images each, [N, C, S, S] in [0, 1]; of volumes the middle slices."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.3 * columns, 1.35 * len(rows) + 0.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, image in zip(line, images, strict=True):
            plane = image[:, image.shape[1] // 2] if image.ndim == 4 else image
            axis.imshow(plane.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    with new_file(path) as aside:  # a kill leaves no half of a picture, which MLflow would refuse for good
        figure.savefig(aside, format="png")
