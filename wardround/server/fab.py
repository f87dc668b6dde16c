"""Flower's app bundle (FAB), without an app in it.

Flower sends a bundle to every site and runs what it names. Ours has no Python at all: its two
entries name the package that is installed on each side, so new code reaches a site only with a new
image that the site pulls itself.
"""

from pathlib import Path

_CONFIG = """\
[project]
name = "wardround-stub"
version = "1.0.0"
description = "Names the apps of the installed package; holds no code"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "wardround"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "wardround.server.app:app"
clientapp = "wardround.client.app:app"

# Flower sends the run config to every site too, so nothing of the coordinator's stands in it.
[tool.flwr.app.config]
run-folder = "."
"""


def write_stub(folder: Path) -> Path:
    """Write the source of the bundle, which `flwr run` packs; the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_CONFIG, encoding="utf-8")
    (folder / "LICENSE").write_text("Apache License 2.0, as Wardround itself.\n", encoding="utf-8")
    return folder
