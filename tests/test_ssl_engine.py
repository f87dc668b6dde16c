"""One joint gradient, however a batch is cut: micro-batches, processes, recomputed activations."""

import pickle
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import begun, tiny

from wardround import ssl as methods
from wardround.client.local_round import Job, local_round, source, train
from wardround.config import FederationConfig, SiteConfig, parse
from wardround.data.index import Index, SiteImages
from wardround.errors import ConfigError, UpdateError
from wardround.ssl.devices import Machine, checked_device, launch, open_fabric
from wardround.ssl.engine import Plain
from wardround.ssl.method import Method
from wardround.update import State, state_hash

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 1, 32, 32), dtype=np.uint8)
PATIENTS = np.arange(10, dtype=np.int32)
COMPARED = {"name": "simclr", "hidden_dim": 16, "output_dim": 8}  # its loss compares the images of a batch


def recipe(method: dict[str, Any] | None = None, **training: Any) -> FederationConfig:
    sizes = {"local_steps": 2, "batch_size": 10, "clip_norm": None, **training}
    return tiny(data={"image_size": 32}, training=sizes, **({"method": method} if method else {}))


def gradients(config: FederationConfig, micro_batch: int = 0, checkpointing: bool = False) -> tuple[float, Method]:
    """Return the loss of step 0 and the method with its gradients, in float64."""
    method = methods.build(config).double()
    if checkpointing:
        method.backbone.checkpoint_activations()
    engine = Plain(method, IMAGES, config, "lyon", open_fabric(Machine(), "float32"), micro_batch)
    batch = tuple(t.double() if t.is_floating_point() else t for t in engine.batch(0))
    return engine.gradients(batch).item(), method


def assert_equal_gradients(one: Method, two: Method, rel: float) -> None:
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            largest = a.grad.abs().max().item()
            np.testing.assert_allclose(b.grad.numpy(), a.grad.numpy(), rtol=rel, atol=rel * largest, err_msg=name)


@pytest.mark.parametrize("method", [None, COMPARED], ids=["alone", "compared"])
@pytest.mark.parametrize("micro_batch", [1, 4, 9])
def test_micro_batches_give_the_joint_gradient(method: dict[str, Any] | None, micro_batch: int) -> None:
    loss, whole = gradients(recipe(method))
    cut_loss, cut = gradients(recipe(method), micro_batch)
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(whole, cut, 2e-6)  # losses are float32 inside, whatever the network's precision


@pytest.mark.parametrize("backbone", [{}, {"name": "resnet18"}], ids=["vit", "resnet18"])
def test_checkpointing_gives_the_same_gradient(backbone: dict[str, Any]) -> None:
    config = tiny(backbone=backbone, method=COMPARED, data={"image_size": 32}, training={"batch_size": 10})
    _, plain = gradients(config)
    _, again = gradients(config, checkpointing=True)
    assert_equal_gradients(plain, again, 1e-9)


def test_checkpointing_that_a_backbone_cannot_is_refused() -> None:
    """timm's VGG has none; and under sparse masking the second pass would not be masked."""
    vgg = methods.build(tiny(backbone={"name": "vgg11"}, method=COMPARED, data={"image_size": 32}))
    with pytest.raises(ConfigError, match="checkpointing = true: this federation's backbone cannot"):
        vgg.backbone.checkpoint_activations()
    with pytest.raises(ConfigError, match="checkpointing"):
        gradients(
            tiny(
                backbone={"name": "resnet18"}, method={"decoder_heads": 3, "decoder_dim": 48}, data={"image_size": 64}
            ),
            checkpointing=True,
        )


def test_a_last_micro_batch_may_be_smaller() -> None:
    config = recipe(batch_size=3)
    _, whole = gradients(config)
    _, cut = gradients(config, 2)
    assert_equal_gradients(whole, cut, 2e-6)


def joint_gradients(fabric: Any, config: FederationConfig) -> dict[str, Any]:
    """Return the loss and the gradients of step 0 as the first of the processes has them, in float64."""
    method = methods.build(config).double()
    engine = Plain(method, IMAGES, config, "lyon", fabric)
    batch = tuple(t.double() if t.is_floating_point() else t for t in engine.batch(0))
    loss = engine.gradients(batch).item()
    return {"loss": loss, **{name: p.grad.numpy() for name, p in method.named_parameters() if p.grad is not None}}


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, COMPARED], ids=["alone", "compared"])
def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(method: dict[str, Any] | None) -> None:
    """Only real processes show that gradients are summed over all of them; five images are shared two and three."""
    config = recipe(method, batch_size=5, clip_norm=1.0)
    one, two = (launch(joint_gradients, Machine(devices=n, threads=1), "float32", config) for n in (1, 2))
    assert one.keys() == two.keys()
    largest = max(np.abs(array).max() for name, array in one.items() if name != "loss")
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-5, atol=1e-6 * largest, err_msg=name)


def diverge(fabric: Any, site: str) -> None:
    if fabric.global_rank == 1:
        raise UpdateError(f"site '{site}': the loss is nan")


@pytest.mark.slow
def test_an_error_of_the_second_process_keeps_its_words() -> None:
    """Only real processes show that an error's class survives torch, which turns it into text."""
    with pytest.raises(UpdateError, match=r"^site 'lyon': the loss is nan$"):
        launch(diverge, Machine(devices=2, threads=1), "float32", "lyon")


LIMITED = """
import logging, resource, sys
import numpy as np, torch
sys.path.insert(0, "tests")
from test_ssl_engine import recipe
from wardround import ssl as methods
from wardround.errors import UpdateError
from wardround.ssl.engine import Plain
logging.basicConfig(format="%(message)s")
config = recipe(batch_size=4096)
method = methods.build(config)
engine = Plain(method, np.zeros((4096, 1, 32, 32), np.uint8), config, "lyon")
batch = engine.batch(0)
engine.micro_batch = 64
engine.gradients(batch)  # what the libraries allocate once is there before the limit is set
engine.micro_batch = 4096
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 160 * 2**20, used + 160 * 2**20))
loss = engine.gradients(batch)
print(engine.micro_batch, torch.isfinite(loss).item(), all(p.grad is not None for p in method.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's memory is Linux's")
def test_where_memory_runs_out_the_batch_is_halved_until_it_fits_and_that_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    micro_batch, finite, filled = done.stdout.split()
    assert int(micro_batch) < 4096 and finite == filled == "True"
    assert "site 'lyon': memory ran out with 4096 images at once; goes on with 2048" in done.stderr


def test_batch_statistics_are_not_cut_in_two() -> None:
    config = tiny(
        backbone={"name": "resnet18", "norm": "batch"}, method=COMPARED, data={"image_size": 32}, training={"rounds": 1}
    )
    engine = Plain(methods.build(config), IMAGES, config, "lyon")
    with pytest.raises(UpdateError, match="memory ran out with 4 images at once"):
        engine._halve()


@pytest.mark.parametrize(
    ("micro_batch", "processes", "words"),
    [
        (1, 1, "with 1 images at once. Set checkpointing = true in site.toml, or ask for a smaller [data] image_size."),
        (0, 2, "with 2 images at once. Set micro_batch in site.toml lower, or checkpointing = true, or ask for a"),
    ],
)
def test_where_no_half_is_left_it_is_said_what_can_still_be_changed(
    micro_batch: int, processes: int, words: str
) -> None:
    config = tiny()
    engine = Plain(methods.build(config), IMAGES, config, "lyon", micro_batch=micro_batch)
    engine.fabric = SimpleNamespace(world_size=processes)  # type: ignore[assignment]  # all that is asked of it
    with pytest.raises(UpdateError, match=re.escape(f"site 'lyon': memory ran out {words}")):
        engine._halve()


@pytest.mark.parametrize("machine", [Machine(micro_batch=2), Machine(devices=2)])
def test_a_site_cannot_cut_a_batch_whose_statistics_normalise_it(machine: Machine) -> None:
    config = tiny(
        backbone={"name": "resnet18", "norm": "batch"}, method=COMPARED, data={"image_size": 32}, training={"rounds": 1}
    )
    site = SiteImages(IMAGES, PATIENTS, PATIENTS >= 0, Index(10, 10, 0, 0, {}, (), 10, {}, 10, 0, {}))
    with pytest.raises(ConfigError, match="needs its 4 images at once, once, on one device"):
        local_round(config.protocol("0" * 64), "lyon", 1, begun({}), {}, site, machine)


def job_of(config: FederationConfig, state: State, machine: Machine) -> Job:
    return Job(config.protocol("0" * 64), "lyon", 1, begun(state), {}, source(IMAGES), machine, PATIENTS, None, None)


def test_a_fresh_teacher_is_the_student_with_what_of_it_stays_at_the_site() -> None:
    config = tiny(
        backbone={"name": "resnet18", "norm": "batch", "batch_norm": "fedbn"},
        method={"name": "byol", "hidden_dim": 16, "output_dim": 8},
        data={"image_size": 32},
        training={"teacher_state": "fresh"},
    )
    method = methods.build(config)
    assert method.teacher is not None
    own = {name: array + 0.5 for name, array in methods.get_site_tensors(method).items() if "teacher." not in name}
    methods.set_state(method, methods.get_state(method))
    methods.set_site_tensors(method, own)
    for name, part in method.taught().items():
        teacher = method.teacher.parts[name].state_dict()
        assert all(torch.equal(teacher[key], tensor) for key, tensor in part.state_dict().items())


def test_frozen_stages_keep_their_bits_and_the_rest_trains() -> None:
    config = recipe()
    frozen = config.model_copy(update={"backbone": config.backbone.model_copy(update={"frozen_stages": 2})})
    state = methods.get_state(methods.build(frozen))
    job = job_of(frozen, state, Machine(threads=1))
    done = launch(train, job.machine, "float32", job)
    still = {name for name, array in state.items() if np.array_equal(array, done.state[name])}
    assert still == {name for name in state if name.startswith(("backbone.patch", "backbone.class", "backbone.blocks"))}
    with pytest.raises(ConfigError, match=r"frozen_stages = 3: 'vit_tiny_patch16_224' has 3 stages; take at most 2"):
        methods.build(frozen.model_copy(update={"backbone": frozen.backbone.model_copy(update={"frozen_stages": 3})}))


def test_the_site_memory_goes_round_through_a_round() -> None:
    config = recipe()
    state = methods.get_state(methods.build(config))
    machine = Machine(threads=1)
    one, again = (launch(train, machine, "float32", job_of(config, state, machine)) for _ in range(2))
    assert state_hash(one.state) == state_hash(again.state)
    assert state_hash(one.memory) == state_hash(again.memory)
    assert {name.split(".")[0] for name in one.memory} == {"step", "exp_avg", "exp_avg_sq"}


def test_processes_map_the_images_from_their_file_instead_of_copying_them(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", IMAGES)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert len(pickle.dumps(source(mapped))) < 1000 < len(pickle.dumps(source(mapped[1:])))
    assert np.array_equal(pickle.loads(pickle.dumps(source(mapped)))(), IMAGES)
    assert np.array_equal(pickle.loads(pickle.dumps(source(mapped[1:])))(), IMAGES[1:])


FAULTS = """
import resource, sys, torch
from wardround.ssl.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is of glibc's allocator")
def test_a_step_does_not_get_its_memory_page_by_page_again() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "kept")
    )
    assert kept < plain / 4


def test_one_numbered_gpu_is_not_several() -> None:
    site = {"format": 1, "name": "lyon", "work": "w", "images": {"folder": "i"}, "device": "cuda:1", "devices": 2}
    with pytest.raises(ConfigError, match="device = 'cuda:1' is one, and devices = 2; write device = 'cuda'"):
        parse(site, SiteConfig, "site.toml")


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "tpu", "cuda:", "CPU", ""])
def test_a_device_that_is_not_here_or_none_is_told_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = "no GPU is seen here; take cpu, or mend the driver" if name in ("cuda", "cuda:1") else "expected cpu, cuda"
    with pytest.raises(ConfigError, match=f"device '{name}': {told}"):
        checked_device(name)
    assert checked_device("cpu", 2) == "cpu"


def test_of_several_devices_those_that_are_here_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checked_device("cuda"), checked_device("cuda", 2), checked_device("cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ConfigError, match=r"device 'cuda:2': 2 GPU\(s\) are seen here, cuda:0 to cuda:1"):
        checked_device("cuda:2")
    with pytest.raises(ConfigError, match=r"devices = 3: 2 GPU\(s\) are seen here"):
        checked_device("cuda", 3)
