"""Where a release comes from: a folder, a finished run, or a registered name."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wardround.errors import CheckpointError, ConfigError
from wardround.registry import release, signing

log = logging.getLogger(__name__)


@contextlib.contextmanager
def release_folder(source: str | Path, uri: str | None = None, trust: str | None = None) -> Iterator[Path]:
    """Give the verified release folder of a source; a pulled one lasts as long.

    `source` is a release folder, a finished run folder, `NAME@alias` or `NAME/version`; the latter two
    are fetched from MLflow at `uri`, by default $MLFLOW_TRACKING_URI. It is signed by one of the fingerprints in
    `trust`, by default $WARDROUND_TRUST; where neither pins one, a warning says of what was fetched that its origin
    is not verified.
    Raises ConfigError for a source that is none, CheckpointError for a release that is damaged, of another
    signer, or not there yet.
    """
    path, pinned = Path(source), trust or signing.pinned_here()
    if path.is_dir():
        if (path / "protocol.json").exists():  # a run folder
            path = path / "release"
            if not path.exists():
                raise CheckpointError(
                    f"{source}: the run has released nothing yet; start its command again to finish it."
                )
        hashes = release.check(path)
        if pinned:
            # Of whatever name it was signed: nobody asked for one.
            manifest = path / signing.MANIFEST
            name = signing.read_manifest(manifest.read_bytes(), str(path)).name if manifest.exists() else ""
            signing.check(path, hashes, name, pinned)
        yield path
        return
    if not re.fullmatch(r"(models:/)?[^/@]+(@[^/@]+|/\d+)", str(source)):
        raise ConfigError(
            f"backbone '{source}': is neither a folder nor NAME@alias nor NAME/version; 'wardround models' lists them."
        )
    address = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if address is None:
        raise ConfigError(
            f"backbone '{source}': MLflow's address is not known; set MLFLOW_TRACKING_URI, "
            "such as sqlite:///runs/mlflow.db."
        )
    from wardround.registry.mlflow_store import Store  # takes two seconds, which a folder need not wait for

    with tempfile.TemporaryDirectory() as aside:
        folder = Store(address).pull(str(source), Path(aside) / "release", pinned)
        if not pinned:
            log.warning("backbone '%s': %s", source, signing.origin(release.signer(folder), None))
        yield folder
