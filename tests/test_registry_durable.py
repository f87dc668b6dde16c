"""What is written is whole or not there, private, and the very bytes that cross."""

import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wardround.errors import CheckpointError
from wardround.registry.durable import new_file, new_folder, write_file, write_tensors
from wardround.update import pack, unpack

TENSORS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.array(3.0), "codes": np.zeros(7, np.int8)}


def test_tensors_are_written_as_they_are_packed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "state.safetensors", TENSORS, {"hash": "1f"})
    block = (tmp_path / "state.safetensors").read_bytes()
    assert block == pack(TENSORS, {"hash": "1f"})
    found, header = unpack(block)
    assert header == {"hash": "1f"} and all(np.array_equal(found[name], TENSORS[name]) for name in TENSORS)


def test_nobody_else_can_read_what_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "block", b"x")
    write_tensors(tmp_path / "state", TENSORS)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o600, 0o600]


def test_what_fails_in_the_middle_leaves_the_file_of_before(tmp_path: Path) -> None:
    write_file(tmp_path / "block", b"before")
    with pytest.raises(KeyError), new_file(tmp_path / "block") as aside:
        aside.write_bytes(b"half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["block"]
    assert (tmp_path / "block").read_bytes() == b"before"


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: the limit stands for a disk, and holds for all that a process writes."""
    code = (
        "import numpy as np, pathlib, sys; from wardround.registry.durable import write_tensors\n"
        "try: write_tensors(pathlib.Path(sys.argv[1]), {'w': np.zeros(10_000)})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, "-c", code, str(tmp_path / "state")]
    said = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"CheckpointError {tmp_path / 'state'}: cannot be written:") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_what_ails_the_disk_is_mended_there(number: int, tmp_path: Path) -> None:
    told = "Nothing committed is lost; mend the disk and start the same command again"
    with pytest.raises(CheckpointError, match=told), new_file(tmp_path / "block"):
        raise OSError(number, "it is so")


def test_what_ails_the_place_asks_for_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/block: cannot be written: .*\. Name another place\.$"):
        write_file(tmp_path / "file" / "block", b"x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"folder: cannot be written: .*\. Name another place\.$"):
        write_file(tmp_path / "folder", b"x")


@pytest.mark.parametrize("stop", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_while_a_folder_is_written_leaves_nothing(stop: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(stop), new_folder(tmp_path / "release") as aside:
        (aside / "model.safetensors").write_bytes(b"half")
        raise stop
    assert list(tmp_path.iterdir()) == []


def named(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(content)
    return folder


def test_a_folder_takes_the_place_of_the_former_only_when_it_is_whole(tmp_path: Path) -> None:
    former = named(tmp_path / "release", "before")
    with pytest.raises(ZeroDivisionError), new_folder(former, replace=True) as aside:
        raise ZeroDivisionError
    with new_folder(former, replace=True) as aside:
        (aside / "file").write_text("after")
        assert (former / "file").read_text() == "before"
    assert (former / "file").read_text() == "after" and list(tmp_path.iterdir()) == [former]


@pytest.mark.parametrize("killed", [1, 2], ids=["between the two renames", "before the former is deleted"])
def test_a_kill_while_a_folder_is_replaced_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    former, done, really = named(tmp_path / "release", "before"), list[Path](), Path.rename

    def rename(path: Path, to: Path) -> Path:
        done.append(really(path, to))
        if len(done) == killed:
            raise KeyboardInterrupt
        return to

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), new_folder(former, replace=True) as aside:
        (aside / "file").write_text("after")
        patch.setattr(Path, "rename", rename)
    with pytest.raises(ZeroDivisionError), new_folder(former, replace=True):
        raise ZeroDivisionError
    assert (former / "file").read_text() == ["before", "after"][killed - 1] and list(tmp_path.iterdir()) == [former]
