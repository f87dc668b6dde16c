"""A released backbone as a timm model."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from wardround.errors import CheckpointError, ConfigError
from wardround.registry import release


def load_backbone(
    source: str | Path,
    *,
    num_classes: int = 0,
    in_chans: int | None = None,
    img_size: int | None = None,
    features_only: bool = False,
    uri: str | None = None,
) -> nn.Module:
    """Return a backbone as timm's model with its trained weights; `num_classes` adds a new, untrained classifier.

    `source` is a release folder, a finished run folder, `NAME@alias` or `NAME/version`; the latter two
    are fetched from MLflow at `uri`, by default $MLFLOW_TRACKING_URI. Another `in_chans` or `img_size`
    adapts the trained weights; with `features_only` the model returns the maps of its stages.
    Raises ConfigError for arguments that this backbone cannot take, CheckpointError for a damaged release.
    """
    wanted = {"in_chans": in_chans, "img_size": img_size, "features_only": features_only or None}
    arguments: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if not features_only:
        arguments["num_classes"] = num_classes
    with release_folder(source, uri) as folder:
        try:
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments)
        except (RuntimeError, ValueError, TypeError, AssertionError, SafetensorError) as error:
            given = ", ".join(f"{key} = {value}" for key, value in arguments.items())
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"backbone '{source}': timm cannot build it with {given}: {reason}") from error
    return model


@contextlib.contextmanager
def release_folder(source: str | Path, uri: str | None = None) -> Iterator[Path]:
    """Give the verified release folder of a source as `load_backbone` takes it; a pulled one lasts as long.

    Raises ConfigError for a source that is none, CheckpointError for a release that is damaged or not there yet.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "protocol.json").exists():  # a run folder
            path = path / "release"
            if not path.exists():
                raise CheckpointError(
                    f"{source}: the run has released nothing yet; start its command again to finish it."
                )
        release.check(path)
        yield path
        return
    if "@" not in str(source) and "/" not in str(source):
        raise ConfigError(f"backbone '{source}': is neither a folder nor NAME@alias; 'wardround models' lists them.")
    address = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if address is None:
        raise ConfigError(f"backbone '{source}': MLflow's address is not known; set MLFLOW_TRACKING_URI.")
    from wardround.registry.mlflow_store import Store  # takes two seconds, which a folder need not wait for

    with tempfile.TemporaryDirectory() as aside:
        yield Store(address).pull(str(source), Path(aside) / "release")
