"""Files of tensors that are read and written one by one: the same bytes as safetensors writes."""

import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from honest_sites import make_run
from safetensors.numpy import load, save

from wardround.encoding import stepped
from wardround.errors import UpdateError
from wardround.registry import checkpoint
from wardround.registry.tensors import TensorFile, TensorWriter
from wardround.server import rounds
from wardround.update import Layout, layout, pack, state_hash

DRAW = np.random.default_rng(0)
TENSORS = {
    "b.weight": DRAW.standard_normal((5, 3, 2)).astype(np.float32),
    "a.codes": DRAW.integers(-9, 9, (4, 7)).astype(np.int8),
    "b.upper": DRAW.integers(0, 9, (3,)).astype(np.uint16),
    "seen": np.array(7, np.int64),
    "clip": np.array(0.5),
    "none": np.zeros((0, 4), np.float32),
    "ü": np.ones(1, np.float16),
    "mask": np.array([True, False]),
}


IN_PLACE = list(load(save(TENSORS)))  # as they lie in the file


def write(path: Path, names: list[str], shapes: Layout) -> str:
    """Return what the writer says is the file's hash."""
    with TensorWriter(path, shapes, {"round": 3, "who": "Malmö"}) as file:
        for name in names:
            file.put(name, TENSORS[name])
    return file.hexdigest()


@pytest.mark.parametrize("names", [IN_PLACE, sorted(TENSORS), sorted(TENSORS, reverse=True)])
def test_tensors_written_in_any_order_give_the_bytes_of_a_block(tmp_path: Path, names: list[str]) -> None:
    found = write(tmp_path / "file", names, layout(TENSORS))
    block = pack(TENSORS, {"round": 3, "who": "Malmö"})
    assert (tmp_path / "file").read_bytes() == block
    assert found == sha256(block).hexdigest()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "file", {}):
        pass
    assert (tmp_path / "file").read_bytes() == pack({}, {})
    assert dict(TensorFile(tmp_path / "file")) == {}


def test_each_tensor_is_read_by_itself_and_in_part(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pack(TENSORS, {"round": 3}))
    found = TensorFile(tmp_path / "file")
    assert found.header == {"round": 3}
    assert found.layout == layout(TENSORS)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    np.testing.assert_array_equal(found.read("b.weight", slice(1, 4)), TENSORS["b.weight"][1:4])
    np.testing.assert_array_equal(found.read("a.codes", slice(3, 9)), TENSORS["a.codes"][3:])


def test_what_is_lacking_or_of_another_shape_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="lacking"):
        write(tmp_path / "one", ["seen"], layout(TENSORS))
    with pytest.raises(AssertionError, match="layout"), TensorWriter(tmp_path / "two", layout(TENSORS)) as file:
        file.put("seen", np.zeros(2))


@pytest.mark.parametrize("kept", [0, 4, 20])
def test_a_file_that_is_cut_in_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "file").write_bytes(pack(TENSORS, {})[:kept])
    with pytest.raises(UpdateError, match="cut or altered"):
        TensorFile(tmp_path / "file")


def test_a_tensor_that_is_cut_is_no_shorter_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pack({"w": np.ones(4)}, {})[:-8])
    with pytest.raises(ValueError, match="reshape"):
        TensorFile(tmp_path / "file")["w"]


def test_a_checkpoint_is_made_with_a_few_of_its_tensors_in_memory(tmp_path: Path) -> None:
    """Seen by numpy's own count of its arrays: 32 tensors of a mebibyte, each new one with residual and codes."""
    run = make_run(tmp_path / "run", encoding="int8")
    state = {f"w{number:02}": np.full(2**18, 0.5, np.float32) for number in range(32)}
    last = checkpoint.write(tmp_path / "0", 0, "d", checkpoint.initial(state))
    del state
    tracemalloc.start()
    made = rounds.draft(run, last, lambda _: np.linspace(0, 1, 2**18), ())
    after = checkpoint.write(tmp_path / "1", 1, "d", made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert after.hash == state_hash(stepped(dict(last.state), after.step, "int8")) == state_hash(after.state)
    assert checkpoint.read(tmp_path / "1") is not None
