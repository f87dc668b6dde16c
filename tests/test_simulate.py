"""A federation in one process, on files: its end, its resumption after kill -9, and what stops it."""

import errno
import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KILLER, ROOT, TINY, merged, tiny, to_toml
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from honest_sites import Sites, ignore, make_run
from matplotlib.figure import Figure
from warm import program

from wardround import simulate as in_process
from wardround.errors import CheckpointError, ConfigError, DataError
from wardround.report.curves import draw_losses
from wardround.report.sheet import draw_sheet
from wardround.server.rounds import run_rounds
from wardround.server.run_folder import RunFolder, open_run
from wardround.server.tracking import Tracking
from wardround.simulate import simulate
from wardround.update import state_hash

TINY_KEPT = {"training": {"optimiser_state": "kept"}, "evaluation_set": {"kind": "procedural", "count": 8}}


def final(run: RunFolder) -> str:
    return state_hash(run.checkpoint(run.committed()[-1]).state)


@pytest.fixture(scope="module")
def whole(data: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run that nobody cut."""
    folder = tmp_path_factory.mktemp("whole")
    return simulate(tiny(**TINY_KEPT), data, folder / "run", store, threads=1)


def test_every_round_is_committed_with_each_sites_figures(whole: RunFolder) -> None:
    assert whole.committed() == [0, 1, 2]
    sites = whole.record(2)["sites"]
    assert {site: figures["images"] for site, figures in sites.items()} == {"lyon": 12, "oslo": 18}
    assert sites["lyon"]["weight"] == pytest.approx(12 / 30)
    assert whole.record(2)["versions"].keys() >= {"torch", "timm", "flwr", "python"}


def test_the_same_seed_gives_the_same_bits(whole: RunFolder, data: Path, store: str, tmp_path: Path) -> None:
    again = simulate(tiny(**TINY_KEPT), data, tmp_path / "run", store, threads=1)
    assert final(again) == final(whole)
    other = simulate(tiny(**TINY_KEPT, seed=9), data, tmp_path / "other", store, threads=1)
    assert final(other) != final(whole)


def test_a_finished_run_started_again_trains_nothing(whole: RunFolder, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole.path / "rounds").rglob("*")}
    simulate(whole.config, data, whole.path, whole.tracking, threads=1)
    assert {path: path.stat().st_mtime_ns for path in (whole.path / "rounds").rglob("*")} == before


def test_public_images_that_are_not_there_stop_it_before_anything_is_written(
    data: Path, store: str, tmp_path: Path
) -> None:
    config = tiny(evaluation_set={"kind": "labelled", "folder": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"\[evaluation_set\] folder = '.*nowhere': is no folder"):
        simulate(config, data, tmp_path / "run", store, threads=1)
    assert not (tmp_path / "run" / "protocol.json").exists()


def test_each_round_has_a_picture_of_the_coordinators_own_images(whole: RunFolder) -> None:
    assert [path.name for path in sorted((whole.path / "pictures").iterdir())] == ["round-00001.png", "round-00002.png"]
    assert (whole.path / "losses.png").stat().st_size > 1000


@pytest.fixture
def command(data: Path, store: str, tmp_path: Path) -> list[str]:
    """Return the CLI's arguments for such a run."""
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(merged(TINY, TINY_KEPT)))
    where = ["--data", str(data), "--out", str(tmp_path / "run"), "--tracking", store]
    return ["simulate", str(config), *where, "--threads", "1"]


def wardround(command: list[str]) -> None:
    subprocess.run([str(program() / "wardround"), *command], cwd=ROOT, check=True)


def test_the_coordinators_images_lie_beside_its_file_wherever_a_command_is_started(
    command: list[str], data: Path, tmp_path: Path
) -> None:
    public = {"evaluation_set": {"kind": "labelled", "folder": "public"}}
    (tmp_path / "tiny.toml").write_text(to_toml(merged(TINY, public)))
    (tmp_path / "public").symlink_to(data)
    wardround(command)
    chosen = open_run(tmp_path / "run").config.evaluation_set
    assert chosen is not None and chosen.folder == tmp_path / "public"
    wardround(["report", str(tmp_path / "run")])
    assert "[evaluation_set]" not in (tmp_path / "run" / "report.html").read_text(), "it has pictures"


def test_killed_while_mlflows_database_is_made_it_goes_on(
    whole: RunFolder, command: list[str], store: str, tmp_path: Path
) -> None:
    """Where it is killed otherwise, tests/test_kill_points.py walks through; this database is made once for those."""
    command[command.index(store)] = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = subprocess.run(
        [program() / "python", "-c", KILLER, "os.link", "1", *command], cwd=ROOT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    wardround(command)
    run = open_run(tmp_path / "run")
    assert final(run) == final(whole)
    assert all((run.round(number) / "logged.json").exists() for number in (1, 2))


def test_ctrl_c_says_how_to_go_on_and_loses_nothing(whole: RunFolder, command: list[str], tmp_path: Path) -> None:
    # A shell's background job starts with SIGINT ignored; a terminal's does not.
    interrupt = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + KILLER
    interrupt = interrupt.replace("signal.SIGKILL", "signal.SIGINT")
    stopped = subprocess.run(
        [program() / "python", "-c", interrupt, "wardround.server.rounds.fold", "2", *command],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert stopped.returncode == 130
    assert stopped.stderr.splitlines()[-1].startswith(
        "stopped; what is committed is kept: start the same command again"
    )
    assert "Traceback" not in stopped.stderr
    wardround(command)
    assert final(open_run(tmp_path / "run")) == final(whole)


def test_mlflow_out_of_reach_lets_training_go_on_and_is_logged_later(
    whole: RunFolder, data: Path, store: str, tmp_path: Path
) -> None:
    from wardround.errors import TrackingError

    nowhere = "http://127.0.0.1:9"  # the discard port: nobody listens
    with pytest.raises(TrackingError):
        simulate(tiny(**TINY_KEPT), data, tmp_path / "run", nowhere, threads=1)
    run = open_run(tmp_path / "run")
    assert run.committed() == [0, 1, 2]
    assert final(run) == final(whole)
    assert not list(run.path.rglob("logged.json"))
    simulate(tiny(**TINY_KEPT), data, tmp_path / "run", store, threads=1)
    assert len(list(run.path.rglob("logged.json"))) == 2


def test_a_picture_is_there_whole_or_not_at_all_and_a_disk_that_refuses_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one, as a kill leaves it, is a round that MLflow takes never, and no later one."""

    def cut(_: Figure, file: Any, **__: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", cut)
    losses, sheet = tmp_path / "losses.png", tmp_path / "pictures" / "round-00001.png"
    for draw in (
        lambda: draw_losses({"lyon": [(1, 0.5)]}, losses, "cut"),
        lambda: draw_sheet({"image": torch.zeros(1, 1, 8, 8)}, sheet, "cut"),
    ):
        with pytest.raises(CheckpointError, match="mend the disk"):
            draw()
    assert not list(tmp_path.rglob("*.png*"))


def test_another_mlflow_than_before_gets_every_round(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_rounds(run, Sites(run), ignore)
    for name in ("one", "other"):
        tracking = Tracking(replace(run, tracking=str(tmp_path / name / "mlflow.db")))
        tracking.log()
        with tracking.store.talk((10, 0)) as client:
            found = client.get_metric_history(tracking.mlflow_run, "sites")
        assert [point.step for point in found] == [1, 2], name
    (run.mark(1)).write_text("{")
    tracking.log()  # a mark that cannot be read is none
    assert run.logged(1) == tracking.mlflow_run
    published = Tracking(replace(run, tracking=str(tmp_path / "public" / "mlflow.db")), elsewhere=True)
    published.log()
    with published.store.talk((10, 0)) as client:
        assert not client.get_metric_history(published.mlflow_run, "sites"), "hospitals' rounds are not for the public"


def test_a_disk_that_is_full_stops_in_one_line_and_goes_on_when_mended(
    whole: RunFolder, command: list[str], tmp_path: Path
) -> None:
    """A file-size limit stands in for the full disk: the kernel refuses the write in the same way."""
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); from wardround.cli import main; main()"
    full = subprocess.run([program() / "python", "-c", limit, *command], cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 2
    last = full.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written: File too large. Nothing committed is lost;" in last
    wardround(command)
    assert final(open_run(tmp_path / "run")) == final(whole)


def test_updates_and_messages_hold_no_name_of_a_file_or_a_patient(whole: RunFolder, data: Path) -> None:
    names = [row.split(",")[0] for row in (data / "labels.csv").read_text().splitlines()[1:]]
    names += [row.split(",")[2] for row in (data / "labels.csv").read_text().splitlines()[1:]]
    for path in whole.path.rglob("*"):
        if path.is_file() and "sites" not in path.relative_to(whole.path).parts:
            block = path.read_bytes()
            assert not [name for name in names if name.encode() in block], path


def test_a_site_without_an_image_stops_before_training_and_names_the_site(tmp_path: Path) -> None:
    for site in ("lyon", "oslo"):
        (tmp_path / "data" / site).mkdir(parents=True)
        (tmp_path / "data" / site / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="lyon"):
        from wardround.simulate import index_sites

        index_sites(tiny(), tmp_path / "data", tmp_path / "run")


def test_the_manifest_of_a_checkpoint_can_be_read_by_a_person(whole: RunFolder) -> None:
    manifest = json.loads((whole.round(2) / "checkpoint" / "manifest.json").read_text())
    assert manifest["protocol"] == whole.digest
    assert manifest["record"]["parent"] == json.loads(
        (whole.round(1) / "checkpoint" / "manifest.json").read_text()
    )["state"]  # fmt: skip
    assert (whole.round(2) / "checkpoint" / "state.safetensors").stat().st_mode & 0o077 == 0


def test_a_site_that_goes_in_a_round_is_asked_anew_and_counts(
    whole: RunFolder, data: Path, store: str, tmp_path: Path
) -> None:
    """Flower says of a site that has gone that it will not answer, though it comes back and replays what it has."""
    gone: list[int] = []

    class Going(in_process.InProcessGrid):
        def _answer(self, message: Message) -> Message:
            answer = super()._answer(message)
            if len(gone) < 2:
                gone.append(message.metadata.dst_node_id)
                return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
            return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "InProcessGrid", Going)
        run = simulate(tiny(**TINY_KEPT), data, tmp_path / "run", store, threads=1)
    assert gone == [1, 2]
    assert [run.record(number)["refused"] for number in (1, 2)] == [{}, {}]
    assert final(run) == final(whole)
