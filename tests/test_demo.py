"""The main job, whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_goes_the_whole_way_and_the_trained_encoder_beats_the_random_one(tmp_path: Path) -> None:
    """Only the whole demo shows that its parts fit together, and that what is trained is worth pulling."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    command = [sys.executable, "-m", "wardround.cli", "demo", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # 1 where the trained encoder does not beat the random one
    for words in ("hillcrest", "quarantined", "bytes sent", "bytes received", "Next:"):
        assert words in done.stdout
    memory = re.search(r"peak memory\W+([\d.]+) GiB", done.stdout)
    assert memory is not None and float(memory[1]) < 4
    provenance = json.loads((tmp_path / "run" / "backbone" / "provenance.json").read_text())
    assert provenance["sites"].keys() == {"hillcrest", "northgate", "riverside"}
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == provenance["round"]
