"""What private pretraining is worth: continued from procedural images, beside its own initialisation.

    python benchmarks/private_utility.py --data shared/data/malaria_cells [--out runs/utility] [--cut 1]

Five sites of malaria_cells, as in federation_configs/malaria_mae.toml: MAE on a small ViT. Arms, all with the
same schedule and evaluated with the same draws of labelled patients:

    random             the encoder's random weights
    initialisation     pretrained on procedural images alone, which nobody owns
    continued          from there, federated, without differential privacy
    patient, eps = E   from there, patient-level DP at every site
    image, eps = E     from there, image-level DP: a weaker promise, with more units to hide among

An arm that is on disk is not trained again. Never below its initialisation is the bar; the table says either way.
"""

import argparse
import csv
import json
import tomllib
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from views import machine

from wardround.config import FederationConfig, parse
from wardround.data import procedural_set, read_labelled
from wardround.downstream.arms import three_arms
from wardround.downstream.evaluate import Evaluation, evaluate
from wardround.privacy.statement import statement
from wardround.server.run_folder import RunFolder, open_run
from wardround.simulate import simulate

PUBLIC = 2000  # procedural images
DELTA = 1e-3  # below one over the patients of the largest site


def main() -> None:
    """Train what is missing, evaluate all arms, print and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, default=Path("runs/utility"))
    options.add_argument(
        "--cut", type=int, default=1, help="take one in so many of the steps; 10 shows whether it runs"
    )
    given = options.parse_args()
    base = tomllib.loads(Path("federation_configs/malaria_mae.toml").read_text())
    releases, said = train(base, given.data, given.out, given.cut)
    found = measure(base, releases, given.data)
    Console().print(table(found))
    name = given.out / "result.json"
    name.write_text(json.dumps(result(found, said), indent=1) + "\n")
    Console().print(f"{name}", highlight=False)


def train(base: dict[str, Any], data: Path, out: Path, cut: int) -> tuple[dict[str, Path], dict[str, str]]:
    """Return each arm's release folder, and the privacy statement of the private ones."""
    public = out / "public"
    write_public(base, public / "procedural")
    first = run(
        config(base, {"rounds": 8, "local_steps": 40 // cut, "warmup_steps": 4}), public, out / "initialisation"
    )
    releases, said = {"initialisation": first.path / "release"}, {}
    start = {"initial_weights": str(first.path / "release")}
    steps = {"rounds": 5, "local_steps": 20 // cut, "learning_rate": 1e-4, "warmup_steps": 5}
    plain = run(config(base, steps, **start), data, out / "continued")
    releases["continued"] = plain.path / "release"
    for unit, epsilon, batch, privacy in (
        ("patient", 8.0, 8, {"images_per_patient": 8}),
        ("patient", 3.0, 8, {"images_per_patient": 8}),
        ("image", 8.0, 64, {}),
    ):
        promised = {"unit": unit, "epsilon": epsilon, "delta": DELTA if unit == "patient" else DELTA / 10, **privacy}
        chosen = config(base, {**steps, "batch_size": batch}, units(data, unit), privacy=promised, **start)
        name = f"{unit}, eps = {epsilon:g}"
        made = run(chosen, data, out / f"{unit}-{epsilon:g}")
        releases[name] = made.path / "release"
        record = made.record(made.committed()[-1])["sites"]
        spent = max(site["epsilon"] for site in record.values())
        said[name] = statement(chosen.privacy, chosen.training.rounds, epsilon=spent)
    return releases, said


def config(
    base: dict[str, Any], training: dict[str, Any], declared: dict[str, int] | None = None, **sections: Any
) -> FederationConfig:
    """Return the federation's config with another schedule."""
    changes = {"training": base["training"] | training, "membership": {"units": declared or {}}}
    return parse({**base, **changes, **sections}, FederationConfig, base["name"])


def units(data: Path, unit: str) -> dict[str, int]:
    """Return each site's declared number of units: of a public set it may be counted, and is rounded down."""
    with (data / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    owned = {(row["site"], row["patient" if unit == "patient" else "file"]) for row in rows}
    counted = Counter(site for site, _ in owned)
    return {site: count // 5 * 5 if unit == "patient" else count // 100 * 100 for site, count in counted.items()}


def run(chosen: FederationConfig, data: Path, out: Path) -> RunFolder:
    """Return a finished run, trained now or before."""
    if (out / "release").exists():
        return open_run(out)
    return simulate(chosen, data, out, f"sqlite:///{out.parent.resolve()}/mlflow.db")


def write_public(base: dict[str, Any], folder: Path) -> None:
    """Write procedural images, as many as a site has patients."""
    if folder.exists():
        return
    images = procedural_set(PUBLIC, 7, config(base, {"rounds": 1, "local_steps": 1, "warmup_steps": 0}).data).images
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image[0]).save(folder / f"{number:05d}.png")


def measure(base: dict[str, Any], releases: dict[str, Path], data: Path) -> Evaluation:
    """Return the probes of all arms on the test split."""
    first = three_arms(releases["initialisation"])
    arms = {"random": first["random"], **{name: three_arms(path)["backbone"] for name, path in releases.items()}}
    return evaluate(arms, read_labelled(data, config(base, {"rounds": 1, "local_steps": 1, "warmup_steps": 0}).data))


def table(found: Evaluation) -> Table:
    """Return AUC by arm, and how far each linear probe lies from the initialisation's."""
    made = Table(title="AUC of frozen backbones, malaria_cells test patients", title_justify="left")
    for column in ("arm", "linear 100 %", "10 %", "1 %", "k-NN 100 %", "linear 100 % against initialisation"):
        made.add_column(column, justify="left" if column == "arm" else "right")
    at = {(row.arm, row.probe, row.fraction): row for row in found.rows}
    for arm in dict.fromkeys(row.arm for row in found.rows):
        cells = [
            f"{row.mean.auc:.3f}" + (f" ± {row.sd.auc:.3f}" if row.sd else "")
            for row in (at[arm, probe, part] for probe, part in COLUMNS)
        ]
        gain = at[arm, "linear", 1.0].mean.auc - at["initialisation", "linear", 1.0].mean.auc
        made.add_row(arm, *cells, f"{gain:+.3f}")
    return made


COLUMNS = (("linear", 1.0), ("linear", 0.1), ("linear", 0.01), ("k-NN", 1.0))


def result(found: Evaluation, said: dict[str, str]) -> dict[str, Any]:
    """Return what is kept: scores, promises, machine and day."""
    scores = json.loads(found.to_json())
    return {"date": f"{date.today()}", "machine": machine(), "privacy": said, "evaluation": scores}


if __name__ == "__main__":
    main()
