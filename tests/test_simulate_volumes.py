"""A federation on volumes in one process: from NIfTI files to a released backbone."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import tiny

from wardround import ssl as methods
from wardround.downstream.evaluate import Request, evaluate_backbone
from wardround.downstream.load import load_backbone
from wardround.errors import ConfigError
from wardround.server.run_folder import RunFolder
from wardround.server.scoring import refuse_unfit
from wardround.simulate import index_sites, simulate
from wardround.update import state_hash

VOLUMES = {
    "backbone": {"name": "monai_vit_tiny", "patch_size": 8, "depth": 1},
    "data": {"dimensions": 3, "image_size": 16, "spacing": [2.0, 2.0, 2.0], "cubes_per_volume": 2},
}


def write_volumes(folder: Path, count: int, seed: int) -> None:
    """Write so many noisy bodies beside some air."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for number in range(count):
        body = draw.integers(100, 1000, (24, 22, 26), dtype=np.int16)
        body[:3] = 0
        nibabel.save(nibabel.Nifti1Image(body, np.diag([-2.0, 2, 2, 1])), folder / f"{number}.nii.gz")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a folder a site."""
    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder / "lyon", 3, seed=0)
    write_volumes(folder / "oslo", 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("run")
    write_volumes(folder / "public", 2, seed=2)
    rows = ["file,label,patient,site,split", "0.nii.gz,well,p0,s,train", "1.nii.gz,ill,p1,s,test"]
    (folder / "public" / "labels.csv").write_text("\n".join(rows) + "\n")
    config = tiny(**VOLUMES, evaluation_set={"kind": "labelled", "folder": str(folder / "public")})
    return simulate(config, data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}", threads=1)


def test_every_round_folds_the_cubes_of_both_sites(run: RunFolder) -> None:
    assert run.committed() == [0, 1, 2]
    sites = run.record(2)["sites"]
    assert {site: figures["images"] for site, figures in sites.items()} == {"lyon": 6, "oslo": 8}
    assert {site: figures["patients"] for site, figures in sites.items()} == {"lyon": 3, "oslo": 4}
    states = [state_hash(run.checkpoint(number).state) for number in run.committed()]
    assert len(set(states)) == 3


def test_each_round_has_a_picture(run: RunFolder) -> None:
    assert [path.name for path in sorted((run.path / "pictures").iterdir())] == ["round-00001.png", "round-00002.png"]


def test_the_release_is_the_encoder_that_was_trained(run: RunFolder) -> None:
    method = methods.build(run.config)
    methods.set_state(method, run.checkpoint(2).state)
    cubes = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_backbone(run.path / "release")(cubes), method.backbone.eval().features(cubes))


def test_what_probes_flat_images_alone_says_so_and_what_to_do(run: RunFolder, tmp_path: Path) -> None:
    asked = Request(source=str(run.path), data=tmp_path)
    with pytest.raises(ConfigError, match=r"is one of volumes, and only .* are probed. Measure it in MONAI"):
        evaluate_backbone(asked)
    with pytest.raises(ConfigError, match=r"is of volumes, .* measure the release in MONAI"):
        refuse_unfit(run)


def test_sites_are_indexed_before_training(data: Path, tmp_path: Path) -> None:
    sites = index_sites(tiny(**VOLUMES), data, tmp_path / "run", threads=1)
    assert {site: images.images.shape for site, images in sites.items()} == {
        "lyon": (6, 1, 16, 16, 16),
        "oslo": (8, 1, 16, 16, 16),
    }
