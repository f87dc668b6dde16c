"""A released backbone as a MONAI bundle, whose features are those of `load_backbone`.

configs/metadata.json    what MONAI must know of it
configs/inference.json   network, preprocessing with the declared normalisation, and `run`: images to features
models/model.pt          the weights, as a plain dictionary of tensors
docs/README.md           the model card
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from torch import nn

from wardround.config import Protocol
from wardround.errors import ConfigError
from wardround.registry.release import CONFIG, is_stock

Floats = NDArray[np.float32]

_SCHEMA = (  # the newest that MONAI's model zoo takes; `verify_metadata` fetches it
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_BUILT_FROM = ("dimensions", "image_size", "spacing", "channels", "mean", "std")  # of [data]
_EXPRESSIONS = ("$", "@", "%", "_target_")  # what MONAI's parser would evaluate


def write(release: Path, recipe: Protocol, backbone: nn.Module, weights: Path) -> Callable[[Floats], Floats]:
    """Write a bundle around the file `weights`, which is its models/model.pt; return the run of what was written."""
    root = weights.parent.parent
    for name in ("configs", "models", "docs"):
        (root / name).mkdir()
    torch.save(backbone.state_dict(), weights)
    with torch.inference_mode():
        width = backbone.eval()(torch.zeros(2, *recipe.data.shape)).shape[1]
    for name, content in (("inference", _inference(release, recipe)), ("metadata", _metadata(recipe, width))):
        (root / "configs" / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    card = release / "README.md"
    said = card.read_text() if card.exists() else f"# {recipe.name}\n\nNo model card was released with it.\n"
    (root / "docs" / "README.md").write_text(said)
    return _runner(root)


def _runner(root: Path) -> Callable[[Floats], Floats]:
    """Return the run of a bundle's network and normalisation, as MONAI builds them from its file."""
    parser = ConfigParser()
    parser.read_config(root / "configs" / "inference.json")
    parser["bundle_root"] = str(root)
    parser["device"] = "$torch.device('cpu')"
    parser.get_parsed_content("trained")
    network, normalise = (parser.get_parsed_content(name) for name in ("network", "normalisation"))

    def run(batch: Floats) -> Floats:
        # A copy: NormalizeIntensityd writes into what it is given.
        images = torch.stack([normalise({"image": torch.tensor(image)})["image"] for image in batch])
        with torch.inference_mode():
            out: Floats = network(images.as_subclass(torch.Tensor)).numpy()
        return out

    return run


def _inference(release: Path, recipe: Protocol) -> dict[str, Any]:
    """Return the configuration that MONAI builds and runs."""
    data = recipe.data
    normalised = {
        "_target_": "NormalizeIntensityd",
        "keys": "image",
        "subtrahend": list(data.mean),
        "divisor": list(data.std),
        "channel_wise": True,
    }
    built = {
        "imports": ["$import pathlib", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_file": "$@bundle_root + '/features.pt'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": _network(release, recipe),
        "network": "$@network_def.eval().requires_grad_(False).to(@device)",
        "checkpoint": "$torch.load(@bundle_root + '/models/model.pt', weights_only=True, map_location=@device)",
        # Not as `initialize`: monai.bundle.load runs that in whatever folder it is called, and loads weights itself.
        "trained": "$@network.load_state_dict(@checkpoint)",
        "normalisation": normalised,
    }
    if data.dimensions == 3:  # which cube of a file is meant, is not the network's to say
        return built
    return {**built, **_from_files(data.channels, data.image_size)}


def _from_files(channels: int, size: int) -> dict[str, Any]:
    """Return how pictures become features: read, made a square by a triangle filter as wide as the reduction."""
    mode = "L" if channels == 1 else "RGB"
    smaller = f"torch.nn.functional.interpolate(image[None], ({size}, {size}), mode='bilinear', antialias=True)[0]"
    steps: list[Any] = [
        {
            "_target_": "LoadImaged",
            "keys": "image",
            "reader": "PILReader",
            "converter": f"$lambda image: image.convert('{mode}')",
            "reverse_indexing": False,
        },
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32", "track_meta": False},
        {"_target_": "Lambdad", "keys": "image", "func": f"$lambda image: {smaller}.round()", "track_meta": False},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 255, "b_min": 0.0, "b_max": 1.0},
        "@normalisation",
        {"_target_": "ToTensord", "keys": "image", "track_meta": False},
    ]
    return {
        "files": "$sorted(str(path) for path in pathlib.Path(@dataset_dir).iterdir())",
        "preprocessing": {"_target_": "Compose", "transforms": steps},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @files]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 16},
        "inferer": {"_target_": "SimpleInferer"},
        "features": "$torch.cat([@inferer(batch['image'].to(@device), @network).cpu() for batch in @dataloader])",
        "run": ["@trained", "$torch.save({'files': @files, 'features': @features}, @output_file)"],
    }


def _network(release: Path, recipe: Protocol) -> dict[str, Any]:
    """Return what MONAI calls to build the network: timm where it suffices, Wardround elsewhere."""
    if is_stock(release):
        said = json.loads((release / CONFIG).read_bytes())
        built = {"model_name": said["architecture"], **said.get("model_args", {}), "num_classes": 0}
        target = "timm.create_model"
    else:
        built = {
            "backbone": recipe.backbone.model_dump(mode="json"),
            "data": recipe.data.model_dump(mode="json", include=set(_BUILT_FROM)),
        }
        if compressed := json.loads((release / CONFIG).read_bytes()).get("compressed"):
            built["shapes"] = compressed["shapes"]
        target = "wardround.backbones.network_of"
    if any(mark in json.dumps(built) for mark in _EXPRESSIONS):
        raise ConfigError(f"{CONFIG}: holds an expression that MONAI would run; such a release is not exported.")
    return {"_target_": target, **built}


def _metadata(recipe: Protocol, width: int) -> dict[str, Any]:
    data = recipe.data
    named = {"timm": version("timm"), "wardround": version("wardround")}
    image = {
        "type": "image",
        "format": "magnitude",
        "num_channels": data.channels,
        "spatial_shape": [data.image_size] * data.dimensions,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": False,
        "channel_def": dict(zip("012", ("red", "green", "blue") if data.channels == 3 else ("grey",), strict=False)),
    }
    pred = {
        "type": "latent",
        "format": "features",
        "num_channels": width,
        "spatial_shape": [],
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": False,
        "channel_def": {},
    }
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "as released"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": named,
        "name": recipe.name,
        "task": "Features of medical images",
        "description": f"A {recipe.backbone.name} pretrained without labels ({recipe.method.name}) by a federation.",
        "authorship": f"The sites of the federation {recipe.name}",
        "copyright": "See docs/README.md",
        "data_source": "See provenance.json",
        "image_classes": "intensities on [0, 1]; `normalisation` of inference.json subtracts the declared mean",
        "pred_classes": f"{width} features of an image",
        "eval_metrics": {},
        "intended_use": "See docs/README.md",
        "references": [],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }
