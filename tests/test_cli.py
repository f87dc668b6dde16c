"""The command as a person meets it: wrong input is one line on stderr and exit 2."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, TINY, another_account, merged, to_toml, write_labelled
from typer.testing import CliRunner
from warm import program

from wardround import __version__
from wardround.cli import cli


def wardround(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [str(program() / "wardround"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.toml"
    path.write_text(to_toml(merged(TINY, changes)))
    return path


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a failed command printed."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def simulate(folder: Path, images: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    store = f"sqlite:///{folder / 'mlflow.db'}"
    command = ("simulate", config(folder, **changes), "--data", images, "--out", folder / "run", "--tracking", store)
    return wardround(*command, "--threads", "1")


def test_the_version_is_the_packages() -> None:
    assert wardround("--version").stdout == f"wardround {__version__}\n"


def test_check_prints_digest_sizes_and_that_there_is_no_privacy(tmp_path: Path) -> None:
    done = wardround("check", config(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("protocol digest", "parameters", "bytes a round and site", "memory", "may be able to reconstruct"):
        assert words in done.stdout


def test_what_belongs_to_another_account_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "theirs"
    home.mkdir(mode=0o700)
    monkeypatch.setattr(sys, "argv", ["wardround", "status", str(home / "run")])
    from wardround.cli import main

    with another_account(home), pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert re.match(rf"error: {home}.*: Permission denied, for account \d+; take the account that owns it", told)


def test_an_unknown_key(tmp_path: Path) -> None:
    assert "did you mean 'local_steps'?" in error_of(wardround("check", config(tmp_path, training={"local_stops": 3})))


@pytest.mark.parametrize("command", ["check", "simulate", "site approve site.toml"])
def test_a_network_that_cannot_be_built_is_told_with_the_files_name(tmp_path: Path, command: str) -> None:
    path = config(tmp_path, backbone={"name": "vit_tiny_patch16_225"})
    (tmp_path / "site.toml").write_text('format = 1\nname = "lyon"\nwork = "work"\n[images]\nfolder = "images"\n')
    write_labelled(tmp_path / "data", {"lyon": 10})
    more = ["--data", tmp_path / "data", "--out", tmp_path / "run"] if command == "simulate" else []
    line = error_of(wardround(*command.split(), path, *more, cwd=tmp_path))
    assert f"{path}: [backbone] name = 'vit_tiny_patch16_225': " in line


def test_a_data_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is no folder; give --data" in error_of(simulate(tmp_path, tmp_path / "absent"))


def test_a_data_folder_without_a_site(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "neither a labels.csv nor a folder a site" in error_of(simulate(tmp_path, tmp_path / "data"))


def test_an_empty_site_folder_and_one_without_a_readable_image_name_the_site(tmp_path: Path) -> None:
    write_labelled(tmp_path / "data" / "lyon", {"x": 10})
    (tmp_path / "data" / "oslo").mkdir()
    assert "site 'oslo'" in error_of(simulate(tmp_path, tmp_path / "data"))
    (tmp_path / "data" / "oslo" / "broken.dcm").write_bytes(b"DICM")
    assert "site 'oslo'" in error_of(simulate(tmp_path, tmp_path / "data"))


def test_a_site_of_another_channel_count_alone_has_no_image_and_is_converted_only_when_asked(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20}, channels=3)
    line = error_of(simulate(tmp_path, data))
    assert "site 'lyon'" in line and "3 channels" in line
    assert simulate(tmp_path, data, data={"convert_channels": True}).returncode == 0


def test_a_site_in_the_config_that_the_data_lacks(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    line = error_of(simulate(tmp_path, data, membership={"sites": {"bern": 1.0}}))
    assert "'bern' is not in" in line and "which has lyon" in line


def test_a_sites_name_that_cannot_be_a_files_is_told_where_it_stands_and_hidden_folders_are_no_sites(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    write_labelled(data / "lyon", {"x": 20})
    (data / ".thumbnails").mkdir()
    assert simulate(tmp_path, data).returncode == 0
    (data / "lyon").rename(data / "St. Mary")
    line = error_of(wardround("simulate", config(tmp_path), "--data", data, "--out", tmp_path / "other"))
    assert "'St. Mary' cannot be a site's name: expected letters" in line and "Rename it there" in line
    assert not (tmp_path / "other").exists()


def test_a_run_folder_of_another_config(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    assert simulate(tmp_path, data).returncode == 0
    line = error_of(simulate(tmp_path, data, training={"learning_rate": 0.5}))
    assert "belongs to another config (training.learning_rate is 0.001 there, 0.5 here)" in line


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    assert simulate(tmp_path, data).returncode == 0
    path = tmp_path / "run" / "rounds" / "00002" / "checkpoint" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = simulate(tmp_path, data)
    assert again.returncode == 0
    assert "it is damaged. Restore it" in again.stdout and "round 2 is trained again" in again.stdout


def test_a_backbone_that_is_not_there_shows_the_nearest_name(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    assert simulate(tmp_path, data).returncode == 0
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "tiny" in error_of(wardround("pull", "tinny@candidate", "--to", tmp_path / "out", "--tracking", store))
    assert "candidate" in error_of(wardround("pull", "tiny@candidat", "--to", tmp_path / "out", "--tracking", store))
    assert wardround("pull", "tiny@candidate", "--to", tmp_path / "out", "--tracking", store).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "tiny" in wardround("models", "--tracking", store).stdout


def test_a_registry_that_cannot_be_reached(tmp_path: Path) -> None:
    line = error_of(wardround("pull", "x@candidate", "--to", tmp_path / "out", "--tracking", "http://127.0.0.1:9"))
    assert "127.0.0.1:9" in line


@pytest.mark.parametrize(
    "command",
    [
        "check BAD",
        "simulate BAD --data x --out y",
        "constants BAD --data x",
        "coordinate BAD --kit x --out y",
        "provision BAD",
        "site check BAD BAD",
        "site check SITE BAD",
        "site approve BAD",
        "site run BAD",
        "site log BAD",
        "site ledger BAD",
    ],
)
def test_a_file_that_does_not_parse_is_refused_before_torch_is_loaded(tmp_path: Path, command: str) -> None:
    """Which takes seconds; here it cannot be imported at all."""
    (tmp_path / "BAD").write_text("format = ")
    (tmp_path / "SITE").write_text('format = 1\nname = "lyon"\nwork = "work"\n\n[images]\nfolder = "images"\n')
    code = "import sys; sys.modules['torch'] = None; from wardround.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert "BAD: is not valid TOML" in error_of(done)


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    done = wardround("--debug", "check", tmp_path / "absent.toml")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_nothing_is_coloured_when_the_output_is_no_terminal(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    done = simulate(tmp_path, data)
    assert done.returncode == 0, done.stderr
    assert "\x1b[" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


def test_a_folder_of_something_else_is_never_written_into(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", {"lyon": 20})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("precious")
    done = wardround("simulate", config(tmp_path), "--data", data, "--out", tmp_path / "elsewhere")
    assert "is not empty and no run of Wardround" in error_of(done)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["thesis.txt"]


def interface(*arguments: str | Path) -> tuple[int, str]:
    """Return the exit code and the standard error of a command run in this process."""
    from wardround.cli import main

    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", ["wardround", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0), error.getvalue()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("evaluate RUN --data x --out absent/scores.json", "--out absent/scores.json: there is no folder absent; make"),
        ("evaluate RUN --data x --out folder", "--out folder: is a folder; name a file in it"),
        ("evaluate RUN --federated --out folder", "--out folder: is a folder"),
        ("evaluate RUN --data x --pictures file", "--pictures file: file is no folder; name another place"),
        ("segment RUN --data x --out absent/scores.json", "there is no folder absent"),
        ("segment RUN --data x --pictures file/deep/er", "--pictures file/deep/er: file is no folder"),
        ("export RUN --format onnx --to file/model", "--to file/model: file is no folder"),
        ("compress RUN --by prune --images x --to file/model", "--to file/model: file is no folder"),
        ("pull tiny@champion --to file/model", "--to file/model: file is no folder"),
        ("report RUN --out folder", "--out folder: is a folder"),
        ("check tiny.toml --curve absent/curve.png", "--curve absent/curve.png: there is no folder absent"),
        ("simulate tiny.toml --data x --out file", "--out file: file is no folder"),
        ("coordinate tiny.toml --kit x --out link", "--out link: link is no folder"),
        ("demo --out file", "--out file: file is no folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    command: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else of these commands is there, so that what looked at it first would say something else."""
    monkeypatch.chdir(tmp_path)
    config(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    code, error = interface(*command.split())
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and told in error


def test_a_place_that_this_account_may_not_write_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's answer is given here."""
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    code, error = interface("evaluate", "RUN", "--data", "x", "--out", tmp_path / "scores.json")
    assert code == 2 and f"scores.json: this account may not write to {tmp_path}; name another place" in error


@pytest.mark.parametrize("command", ["evaluate RUN --data x", "segment RUN --data x", "compress RUN --by prune"])
@pytest.mark.parametrize(("device", "told"), [("cuda", "no GPU is seen here"), ("tpu", "expected cpu, cuda or cuda:N")])
def test_a_device_that_is_not_here_is_told_before_the_work(
    command: str, device: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    more = ["--images", "x", "--to", tmp_path / "made"] if command.startswith("compress") else []
    code, error = interface(*command.split(), *more, "--device", device)
    assert code == 2 and error.count("\n") == 1 and f"device '{device}': {told}" in error


ON = "stopped; what is committed is kept: start the same command again to go on."
NOTHING = "stopped; nothing was written."
MEASURED = "stopped; nothing was written, unless results stand above."


@pytest.mark.parametrize(
    ("command", "where", "told"),
    [
        ("demo", "wardround.demo.run_demo", ON),
        ("--debug site run site.toml", "wardround.client.supervisor.run_site", ON),
        ("export RUN --format onnx --to made", "wardround.downstream.export.export", NOTHING),
        ("--log-json report RUN", "wardround.server.report.write_report", NOTHING),
        ("evaluate RUN --data x", "wardround.downstream.evaluate.evaluate_backbone", MEASURED),
        ("evaluate RUN --federated", "wardround.server.run_folder.open_run", "stopped."),
        ("site log site.toml", "wardround.config.read_site", "stopped."),
    ],
)
def test_ctrl_c_promises_what_is_so_of_the_command(
    command: str, where: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wardround.logs.begin_prints", lambda: None)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    code, error = interface(*command.split())
    assert (code, error.splitlines()[-1]) == (130, told)


def test_help_keeps_what_stands_in_brackets() -> None:
    done = CliRunner().invoke(cli, ["register", "--help"], env={"COLUMNS": "200"})
    assert "default: probes on [evaluation_set]." in done.stdout


def test_a_curve_of_a_config_without_privacy_is_refused(tmp_path: Path) -> None:
    code, error = interface("check", config(tmp_path), "--curve", tmp_path / "curve.png")
    assert code == 2 and "--curve: draws epsilon, and this config spends none; add [privacy], or leave it out" in error
    assert not (tmp_path / "curve.png").exists()


def test_scores_of_a_run_and_a_new_champion_end_with_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "protocol.json").write_text("{}")
    found = SimpleNamespace(to_json=lambda: "{}", name="eye", version="3", champion=None)
    monkeypatch.setattr("wardround.downstream.evaluate.evaluate_backbone", lambda _, tell: tell(found))
    monkeypatch.setattr("wardround.report.measured.tables", lambda _: [])
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "run", "--data", "x", "--out", "scores.json"]
    assert CliRunner().invoke(cli, words).stdout.endswith("Next:\n  wardround register run --scores scores.json\n")
    assert "Next" not in CliRunner().invoke(cli, ["evaluate", "eye@champion", *words[2:]]).stdout
    monkeypatch.setattr("wardround.registry.mlflow_store.Store", lambda _: None)
    monkeypatch.setattr("wardround.registry.promotion.promote", lambda *_: found)
    said = CliRunner().invoke(cli, ["promote", "eye@candidate", "--by", "Ada", "--why", "first"]).stdout
    assert said.endswith("Next:\n  wardround pull eye@champion --to backbone\n")
