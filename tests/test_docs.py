"""The documentation is run: every code block, every command, every key."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, write_labelled
from warm import program

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
KINDS = {"bash", "python", "toml", "text"}  # text: pictures and output, which nothing can run


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fenced code blocks of a page: (language, code)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_block_says_what_it_is(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= KINDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("folder", ["wardround", "docker", "federation_configs"])
def test_every_page_that_a_source_file_names_is_here(folder: str) -> None:
    for path in [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".toml")]:
        for name in re.findall(r"[\w./-]+\.md\b", path.read_text()):
            written = name.endswith("README.md")  # a kit's, a release's, a bundle's
            assert written or (ROOT / name).exists(), (path, name)


def test_the_reference_pages_are_what_the_code_says() -> None:
    code = (
        "import pathlib, make_reference as r; "
        "assert pathlib.Path('docs/commands.md').read_text() == r.commands(), 'commands'; "
        "assert pathlib.Path('docs/config.md').read_text() == r.config(), 'config'"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make docs`: {done.stderr}"


def test_the_two_commands_of_the_readme_are_make_targets_that_run_the_main_job_and_the_tests() -> None:
    commands = [code.strip() for language, code in blocks(ROOT / "README.md") if language == "bash"]
    assert "make demo\nmake test" in commands
    plans = {
        target: subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("demo", "test")
    }
    assert "wardround demo" in plans["demo"]
    assert "-m pytest" in plans["test"]


def test_the_command_of_the_evidence_is_a_make_target_that_measures() -> None:
    (command,) = (code.strip() for language, code in blocks(ROOT / "docs" / "evidence.md") if language == "bash")
    plan = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "benchmarks/utility.py --suite malaria --data images --quick" in plan


def scripts() -> list[Path]:
    return [page for page in PAGES if any(language in ("bash", "python", "toml") for language, _ in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", scripts(), ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    """Only running it shows that what a reader pastes works, in the order of the page."""
    shutil.copytree(ROOT / "federation_configs", tmp_path / "federation_configs")
    write_labelled(tmp_path / "images", {"lyon": 40, "oslo": 60}, size=32)
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PATH"] = os.pathsep.join((str(program()), str(Path(sys.executable).parent), environment["PATH"]))
    for language, code in blocks(page):
        if language == "toml":
            tomllib.loads(code)
        elif language in ("bash", "python") and "make " not in code:  # make has a test of its own, above
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else ["python", "-c", code]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_test_that_the_threat_model_names_exists() -> None:
    known = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), flags=re.MULTILINE)
    }
    lines = (ROOT / "docs" / "security.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| shown by |")]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rpartition(" | ")[2])
        assert named and set(named) <= known, row
