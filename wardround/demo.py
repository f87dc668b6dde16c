"""The whole way on a laptop: three procedural hospitals, one backbone, a downstream probe."""

import resource
import sys
import time
from pathlib import Path

from rich.console import Console

from wardround.config import read_federation
from wardround.data import positioning_set, write_hospitals
from wardround.downstream.evaluate import Evaluation, compare
from wardround.registry.mlflow_store import Store
from wardround.report.measured import score_table
from wardround.report.tables import index_table, left_out_lines, rounds_table, table, told
from wardround.server.run_folder import RunFolder
from wardround.simulate import index_sites, simulate

CONFIG = Path(__file__).with_name("demo.toml")  # in the package, so that an installed wheel has it
HELD_OUT_SEED = 20_260_101  # phantoms of patients that no hospital has


def run_demo(out: Path, tracking: str, console: Console) -> None:
    """Run the demo in a run folder; an unfinished one goes on."""
    started = time.monotonic()
    config = read_federation(CONFIG)

    console.rule("1 of 5: three hospitals write DICOM", align="left")
    hospitals = out / "hospitals"
    if not (hospitals / ".whole").exists():
        write_hospitals(hospitals, config.seed)
        (hospitals / ".whole").touch()

    console.rule("2 of 5: each hospital indexes its images", align="left")
    sites = index_sites(config, hospitals, out)
    console.print(index_table(sites))
    for line in left_out_lines(sites, most=3):
        console.print(line, style="dim", highlight=False, soft_wrap=True)

    console.rule("3 of 5: they pretrain one backbone; weight updates travel, images do not", align="left")
    run = simulate(config, hospitals, out, tracking)
    console.print(rounds_table([run.record(number) for number in run.committed()[1:]]))

    console.rule("4 of 5: a downstream team pulls the backbone", align="left")
    reference = f"{config.name}@candidate"
    backbone = Store(tracking).pull(reference, out / "backbone")
    console.print(f"{reference} -> {backbone}", highlight=False)

    console.rule("5 of 5: and measures it on held-out patients: straight, or tilted to a side?", align="left")
    evaluation = compare(backbone, positioning_set(900, HELD_OUT_SEED, config.data), fractions=(0.1, 1.0), draws=3)
    console.print(score_table(evaluation))
    console.print(summary(run, evaluation, time.monotonic() - started))
    console.print(
        f"Reconstructions of every round: {out}/pictures   losses: {out}/losses.png", highlight=False, soft_wrap=True
    )
    if evaluation.score("backbone") <= evaluation.score("random"):
        console.print(
            "The trained encoder did not beat the random one. Please report this as a defect.", style="bold red"
        )
        sys.exit(1)
    console.print(
        f"\nNext:\n  wardround report {out}\n  mlflow ui --backend-store-uri {tracking}\n  wardround models\n"
        "  wardround check federation_configs/smoke.toml\n"
        "  wardround simulate federation_configs/smoke.toml --data A_LABELLED_FOLDER --out runs/smoke",
        highlight=False,
        soft_wrap=True,
    )


def summary(run: RunFolder, evaluation: Evaluation, seconds: float) -> object:
    """Return the closing table: what was trained, what it cost, and whether it helped."""
    records = [run.record(number) for number in run.committed()[1:]]
    sites = records[-1]["sites"]
    made = table("The federation", "what", "value")
    rows = {
        "rounds": str(len(records)),
        "sites": ", ".join(sorted(sites)),
        "images": told((site["images"] for site in sites.values()), sum, ","),
        "seconds": f"{seconds:.0f} in all, {sum(record['seconds'] for record in records):.0f} in rounds",
        "bytes sent": f"{sum(record['bytes_sent'] for record in records):,}",
        "bytes received": f"{sum(record['bytes_received'] for record in records):,}",
        "peak memory": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
        "linear probe": f"{evaluation.score('backbone'):.3f} trained, {evaluation.score('random'):.3f} random",
    }
    for name, value in rows.items():
        made.add_row(name, value)
    return made
