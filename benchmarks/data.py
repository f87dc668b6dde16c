"""How fast images come from DICOM and from the cache, and whether the cache outruns training.

    python benchmarks/data.py [--patients 60] [--repeats 5] [--out FILE.json]

Three scanners' phantoms (12 bits uncompressed, 16 bits JPEG 2000, 8 bits uncompressed), each arm from
the same files to the same 64 x 64 bytes, the arms taking turns in each repeat, on one thread:

    wardround  open_site on an empty work folder: hashes every byte, reads the header, applies criteria and
               opt-outs, decodes, windows, resizes, and writes cache and journal
    monai      LoadImage (its PydicomReader) + EnsureChannelFirst + ScaleIntensity + Resize (area) to bytes
    pydicom    dcmread + pixel_array + apply_modality_lut + apply_voi_lut, scaled, then Pillow's resize

`warm` is open_site again, with nothing new. `cache` gathers random batches of 64 from the mapped rows and
turns them into float32. `training` is a step of the ViT-Tiny MAE of wardround/demo.toml on such a batch.
Ratios are taken within a repeat: their median and range are printed.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pydicom
import torch
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Resize, ScaleIntensity
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from rich.console import Console
from rich.table import Table

from wardround.config import FederationConfig, SiteConfig, read_toml
from wardround.config.federation import DataConfig
from wardround.config.site import ImagesConfig
from wardround.data import SiteImages, open_site, write_hospitals
from wardround.ssl import build
from wardround.ssl.engine import Plain
from wardround.ssl.pretrain import pretrain

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
DATA = DataConfig(image_size=SIZE)
BATCH = 64
PACKAGES = ("pydicom", "monai", "pillow", "numpy", "torch", "pylibjpeg-openjpeg")


def main() -> None:
    """Print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patients", type=int, default=60, help="of each hospital")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sites = write_hospitals(folder / "hospitals", seed=1, patients=arguments.patients)
        dicom = {site: from_dicom(folder, site, arguments.repeats) for site in sites}
        cached = from_cache(open_at(folder, sites[0], "cache"), arguments.repeats)
    report = {"date": str(date.today()), "machine": machine(), "dicom": dicom, "cache": cached}
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def from_dicom(folder: Path, site: str, repeats: int) -> dict[str, object]:
    """Return the images a second of each arm on one site's files, and the ratios to MONAI."""
    files = sorted((folder / "hospitals" / site).glob("P*/IM?.dcm"))
    load = monai_chain()
    rates: dict[str, list[float]] = {"wardround": [], "monai": [], "pydicom": [], "warm": []}
    for repeat in range(repeats):
        rates["wardround"].append(rate(lambda: open_at(folder, site, f"{repeat}"), len(files)))  # noqa: B023
        rates["monai"].append(rate(lambda: [load(path) for path in files], len(files)))
        rates["pydicom"].append(rate(lambda: [plain_pydicom(path) for path in files], len(files)))
        rates["warm"].append(rate(lambda: open_at(folder, site, f"{repeat}"), len(files)))  # noqa: B023
    ratios = {arm: spread([a / b for a, b in zip(rates[arm], rates["monai"], strict=True)]) for arm in rates}
    return {"files": len(files), "images_per_second": {arm: spread(r) for arm, r in rates.items()}, "to_monai": ratios}


def from_cache(found: SiteImages, repeats: int) -> dict[str, object]:
    """Return the images a second that the mapped rows give and that training takes, and their ratio."""
    draw = np.random.default_rng(0)
    recipe = read_toml(ROOT / "wardround" / "demo.toml", FederationConfig)
    method = build(recipe)
    engine = Plain(method, found.images, recipe, "benchmark")
    pretrain(method, engine, 0, 1, {}, "warming up")

    def gather() -> None:
        for _ in range(200):
            rows = draw.integers(0, found.num_images, BATCH)
            torch.from_numpy(found.images[rows]).float().div_(255)

    fed, eaten = [], []
    for _ in range(repeats):
        fed.append(rate(gather, 200 * BATCH))
        eaten.append(rate(lambda: pretrain(method, engine, 0, 4, {}, "step"), 4 * recipe.training.batch_size))
    ratios = [a / b for a, b in zip(fed, eaten, strict=True)]
    return {"cache": spread(fed), "training": spread(eaten), "cache_to_training": spread(ratios)}


def open_at(folder: Path, site: str, work: str) -> SiteImages:
    """Return a site's images with a work folder of this name."""
    images = ImagesConfig(folder=folder / "hospitals" / site)
    return open_site(SiteConfig(format=1, name=site, images=images, work=folder / "work" / site / work), DATA)


def monai_chain() -> Callable[[Path], NDArray[np.uint8]]:
    """Return MONAI's way from a file to bytes."""
    chain = Compose(
        [
            LoadImage(image_only=True, reader="PydicomReader"),
            EnsureChannelFirst(channel_dim="no_channel"),
            ScaleIntensity(0, 255),
            Resize((SIZE, SIZE), mode="area"),
        ]
    )
    return lambda path: chain(path)[..., :, :].numpy().astype(np.uint8)


def plain_pydicom(path: Path) -> NDArray[np.uint8]:
    """Return pydicom's way from a file to bytes."""
    dataset = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
    scaled = (values - values.min()) / (values.max() - values.min())
    picture = Image.fromarray(scaled).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.rint(np.asarray(picture) * 255).astype(np.uint8)


def rate(work: Callable[[], object], images: int) -> float:
    """Return the images a second of a piece of work."""
    started = time.perf_counter()
    work()
    return images / (time.perf_counter() - started)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, str]:
    """Return the processor, its cores, the memory and the versions that count here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = {name: version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "memory": memory,
        "python": platform.python_version(),
        **versions,
    }


def show(report: dict[str, object]) -> None:
    """Print the tables that a person reads."""
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)  # type: ignore[attr-defined]
    table = Table("site", "arm", "images/s (range)", "times MONAI (range)", title="From DICOM, one thread")
    for site, result in report["dicom"].items():  # type: ignore[attr-defined]
        for arm, found in result["images_per_second"].items():
            ratio = "" if arm == "monai" else cell(result["to_monai"][arm], ".1f")
            table.add_row(site, arm, cell(found, ",.0f"), ratio)
    console.print(table)
    cached = report["cache"]
    table = Table("what", "median (range)", title=f"From the cache, batches of {BATCH}, one thread")
    table.add_row("cache, images/s", cell(cached["cache"], ",.0f"))  # type: ignore[index]
    table.add_row("ViT-Tiny MAE training, images/s", cell(cached["training"], ",.0f"))  # type: ignore[index]
    table.add_row("cache / training (asked: 5)", cell(cached["cache_to_training"], ",.0f"))  # type: ignore[index]
    console.print(table)


def cell(found: dict[str, float], form: str) -> str:
    """Return a median and its range as text."""
    return f"{found['median']:{form}} ({found['min']:{form}} to {found['max']:{form}})"


if __name__ == "__main__":
    main()
