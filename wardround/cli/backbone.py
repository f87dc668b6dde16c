"""Commands of a downstream team: find a backbone, pull it, measure it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wardround.cli.options import Tracking, default_tracking, say_next


def models(tracking: Tracking = None) -> None:
    """List the registered backbones."""
    from wardround.registry.mlflow_store import Store
    from wardround.report.tables import models_table

    Console().print(models_table(Store(tracking or default_tracking()).models()))


def pull(
    reference: Annotated[str, typer.Argument(help="NAME@alias or NAME/version.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    tracking: Tracking = None,
) -> None:
    """Fetch a registered backbone into a folder that timm loads."""
    from wardround.registry.mlflow_store import Store
    from wardround.registry.release import is_stock

    folder = Store(tracking or default_tracking()).pull(reference, to)
    if is_stock(folder):
        say_next(f"python -c 'import timm; timm.create_model(\"local-dir:{folder}\", pretrained=True, num_classes=2)'")
    else:
        say_next(f"python -c 'import wardround; wardround.load_backbone(\"{folder}\", num_classes=2)'")


def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, a pulled backbone's folder, or NAME@alias.")],
    data: Annotated[Path, typer.Option(help="A labelled folder with patient-disjoint splits.")],
    label: Annotated[str, typer.Option(help="The column of labels.csv to predict.")] = "label",
    draws: Annotated[int, typer.Option(help="Draws of patients at 1 and 10 % of the labels.", min=1, max=50)] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
    tracking: Tracking = None,
) -> None:
    """Compare a backbone with its random initialisation and with raw pixels: k-NN and linear probe."""
    from wardround.downstream.evaluate import evaluate_backbone

    evaluation = evaluate_backbone(source, data, label, draws, tracking or default_tracking())
    Console().print(evaluation.table())
    if out is not None:
        out.write_text(evaluation.to_json())
