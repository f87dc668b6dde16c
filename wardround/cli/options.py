"""What several commands share: the kinds of their arguments, and the line that says what to type next."""

import os
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

Config = Annotated[Path, typer.Argument(help="A federation's file, such as federation_configs/smoke.toml.")]
Data = Annotated[Path, typer.Option(help="A labelled folder (labels.csv), or a folder with one folder a site.")]
Out = Annotated[Path, typer.Option(help="The run folder; an unfinished run in it goes on.")]
Tracking = Annotated[
    str | None,
    typer.Option(help="MLflow's address; default: $MLFLOW_TRACKING_URI, else an SQLite file in runs/."),
]
Trust = Annotated[
    str | None,
    typer.Option(
        help="Who may have signed it: the fingerprint that the coordinator read out (SHA256:...); several with commas.",
        envvar="WARDROUND_TRUST",
    ),
]
Kits = Annotated[Path, typer.Option(help="Where the kits are: the coordinator's folder and one a site.")]
Site = Annotated[str, typer.Argument(help="The site's name.")]
SiteFile = Annotated[Path, typer.Argument(help="The site's own site.toml.")]


class FirstByDefault(TyperGroup):
    """`wardround site ledger SITE.toml` is short for `wardround site ledger show SITE.toml`: its first command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the command where only a file is named."""
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])


def default_tracking() -> str:
    """Return where federations are tracked unless --tracking says otherwise."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def say_next(*commands: str) -> None:
    """Print what a person would type next."""
    typer.echo("\nNext:" + "".join(f"\n  {command}" for command in commands))
