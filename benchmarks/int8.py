"""What int8 on the wire costs the backbone: a paired difference of probes over seeds.

    python benchmarks/int8.py --data shared/data/malaria_cells [--seeds 3] [--out runs/int8] [--json FILE]

malaria_mae.toml over its five sites with a tenth of the passes (12 rounds of 8 steps, batches of 32), so that it takes
minutes a run; the numbers cross both ways as the config says. Int8 starts from the same weights and meets the
same images in the same order as float32 of the same seed, so the difference of their linear probes at all labels is the
encoding's alone. The interval is Student's, 95 %. A run that is on disk is not trained again.
"""

import argparse
import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import t
from views import machine

from wardround.config import FederationConfig, parse
from wardround.data import read_labelled
from wardround.downstream.arms import three_arms
from wardround.downstream.evaluate import evaluate
from wardround.server.run_folder import RunFolder, open_run
from wardround.simulate import simulate

ENCODINGS = ("float32", "int8")
TRAINING = {"rounds": 12, "local_steps": 8, "batch_size": 32, "warmup_steps": 10, "learning_rate": 7.5e-4}


def main() -> None:
    """Train what is missing, probe all, print and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/int8"))
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    rows = [measure(seed, kind, given.data, given.out) for seed in range(1, given.seeds + 1) for kind in ENCODINGS]
    compared = {kind: difference(rows, kind) for kind in ENCODINGS[1:]}
    Console().print(table(rows, compared))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows, "paired": compared}, indent=1) + "\n")


def measure(seed: int, kind: str, data: Path, out: Path) -> dict[str, Any]:
    """Return a run's probe on the test patients, and the bytes of its last round."""
    base = tomllib.loads(Path("federation_configs/malaria_mae.toml").read_text())
    raw = base | {"seed": seed, "encoding": kind, "training": base["training"] | TRAINING}
    config = parse(raw, FederationConfig, base["name"])
    folder = out / f"{kind}-{seed}"
    done = (folder / "release").exists()
    tracking = f"sqlite:///{(out / 'mlflow.db').resolve()}"
    run: RunFolder = open_run(folder) if done else simulate(config, data, folder, tracking)
    kept = folder / "probe.json"
    if not kept.exists():
        found = evaluate({"backbone": three_arms(run.path / "release")["backbone"]}, read_labelled(data, config.data))
        kept.write_text(found.to_json())
    rows = json.loads(kept.read_text())["rows"]
    auc = next(row["mean"]["auc"] for row in rows if row["probe"] == "linear" and row["fraction"] == 1.0)
    record = run.record(run.committed()[-1])
    return {"seed": seed, "encoding": kind, "auc": auc, "bytes": record["bytes_sent"] + record["bytes_received"]}


def difference(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Return the mean over the seeds of an encoding's AUC less float32's, and half of its 95 % interval."""
    auc = {(row["seed"], row["encoding"]): row["auc"] for row in rows}
    paired = [auc[seed, kind] - auc[seed, "float32"] for seed in sorted({row["seed"] for row in rows})]
    half = float(t.ppf(0.975, len(paired) - 1)) * statistics.stdev(paired) / len(paired) ** 0.5
    return {"mean": statistics.mean(paired), "half": half}


def table(rows: list[dict[str, Any]], compared: dict[str, dict[str, float]]) -> Table:
    """Return AUC by encoding and seed, the difference to float32, and the bytes of a round."""
    made = Table(title="Linear probe at all labels, AUC", title_justify="left")
    seeds = sorted({row["seed"] for row in rows})
    for column in ("encoding", *(f"seed {seed}" for seed in seeds), "less float32, 95 %", "MB a round"):
        made.add_column(column, justify="left" if column == "encoding" else "right")
    for kind in ENCODINGS:
        own = [row for row in rows if row["encoding"] == kind]
        less = f"{compared[kind]['mean']:+.4f} ± {compared[kind]['half']:.4f}" if kind in compared else ""
        made.add_row(kind, *(f"{row['auc']:.4f}" for row in own), less, f"{own[0]['bytes'] / 1e6:.1f}")
    return made


if __name__ == "__main__":
    main()
