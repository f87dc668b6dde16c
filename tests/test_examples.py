"""The examples in docstrings say what the code does."""

import doctest
import importlib
from pathlib import Path

import pytest
from conftest import ROOT

TOLD = sorted(
    path.relative_to(folder)
    for folder in (ROOT, ROOT / "benchmarks")
    for path in (folder / "wardround" if folder == ROOT else folder).rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("path", TOLD, ids=str)
def test_the_examples_of_a_module_hold(path: Path) -> None:
    found = doctest.testmod(importlib.import_module(".".join(path.with_suffix("").parts)))
    assert found.attempted and not found.failed
