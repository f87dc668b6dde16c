"""What an exported backbone is worth beside torch's."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def exported_table(found: Mapping[str, Any]) -> Table:
    """Return size, time and distance of an export, whose fields are those of downstream.export.Exported."""
    made = Table(title=f"{found['file']}: {found['format']}", title_justify="left", title_style="bold")
    for column in ("", "MB", "ms an image", "largest error", "least cosine"):
        made.add_column(column, justify="left" if column == "" else "right")
    made.add_row("torch, float32", f"{found['torch_megabytes']:.1f}", f"{found['torch_milliseconds']:.2f}", "", "")
    distance = (f"{found['largest_error']:.1e}", f"{found['least_cosine']:.5f}")
    made.add_row(found["format"], f"{found['megabytes']:.1f}", f"{found['milliseconds']:.2f}", *distance)
    made.caption = f"on {found['images']} {found['of']}, one thread, batches of 16"
    made.caption_justify = "left"
    return made
