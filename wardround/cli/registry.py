"""Commands over the registered backbones: list, fetch, register, promote, roll back."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wardround.cli.options import Tracking, Trust, check_folder, default_tracking, say_next

Reference = Annotated[str, typer.Argument(help="NAME@alias or NAME/version.")]


def models(tracking: Tracking = None) -> None:
    """List the registered backbones: champion and candidates, their probes beside the floors, their privacy."""
    from wardround.registry.mlflow_store import Store
    from wardround.report.releases import models_table

    Console().print(models_table(Store(tracking or default_tracking()).models()))


def pull(
    reference: Reference,
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Fetch a registered backbone into a folder that timm loads, its hashes and its signature verified."""
    check_folder("--to", to)
    from wardround.registry.mlflow_store import Store
    from wardround.registry.release import is_stock, signer
    from wardround.registry.signing import origin

    folder = Store(tracking or default_tracking()).pull(reference, to, trust)
    typer.echo(origin(signer(folder), trust))
    if is_stock(folder):
        say_next(f"python -c 'import timm; timm.create_model(\"local-dir:{folder}\", pretrained=True, num_classes=2)'")
    else:
        say_next(f"python -c 'import wardround; wardround.load_backbone(\"{folder}\", num_classes=2)'")


def register(
    run: Annotated[Path, typer.Argument(help="A run folder: the --out of `coordinate` or `simulate`.")],
    number: Annotated[
        int | None, typer.Option("--round", help="A committed round; default: the newest.", min=1)
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="What `wardround evaluate --out` wrote of this round; default: probes on \\[evaluation_set]."
        ),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(help="The coordinator's folder, whose release.key signs; not needed after `simulate`."),
    ] = None,
    tracking: Annotated[str | None, typer.Option(help="MLflow's address; default: that of the run.")] = None,
) -> None:
    """Make a committed round a candidate: release it with its lineage, signed, and register it."""
    from wardround.server.tracking import register as register_round

    reference = register_round(run, number, scores, kit, tracking)
    name, _, version = reference.partition("/")
    typer.echo(f"{reference} is registered, as {name}@candidate")
    say_next(f"wardround promote {name}/{version} --by YOU --why REASON")


def promote(
    reference: Reference,
    by: Annotated[str, typer.Option(help="Who decides it.")],
    why: Annotated[str, typer.Option(help="Why, in a line.")],
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Make a version the champion, if it passes the gate of its federation's file; print what the gate finds."""
    from wardround.registry.mlflow_store import Store
    from wardround.registry.promotion import promote as pass_gate
    from wardround.report.releases import gate_table

    console = Console()
    store = Store(tracking or default_tracking())
    examined = pass_gate(store, reference, by, why, trust, lambda found: console.print(gate_table(found)))
    typer.echo(f"{examined.name}/{examined.version} is the champion now; before: {examined.champion or 'none'}")
    say_next(f"wardround pull {examined.name}@champion --to backbone")


def rollback(
    name: Annotated[str, typer.Argument(help="The registered name.")],
    by: Annotated[str, typer.Option(help="Who decides it; default: this account.")] = "",
    why: Annotated[str, typer.Option(help="Why, in a line.")] = "rolled back",
    trust: Trust = None,
    tracking: Tracking = None,
) -> None:
    """Make the former champion the champion again."""
    from wardround.registry.mlflow_store import Store
    from wardround.registry.promotion import rollback as go_back

    former, current = go_back(Store(tracking or default_tracking()), name, by, why, trust)
    typer.echo(f"{name}/{former} is the champion again; it was version {current}")
