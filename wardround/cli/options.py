"""What several commands share: kinds of arguments, where they may write, the line that says what to type next."""

import os
from pathlib import Path
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from wardround.errors import ConfigError

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


def check_file(option: str, path: Path | None) -> None:
    """Raise ConfigError where a file that an option names could not be written: before the work, not after hours."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it, or name another place.")
    _check_access(option, path, path if path.exists() else path.parent)


def check_folder(option: str, path: Path | None) -> None:
    """Raise ConfigError where a folder that an option names could not be made or written; it is not made here."""
    if path is None:
        return
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ConfigError(f"{option} {path}: {there} is no folder; name another place.")
    _check_access(option, path, there)


def _check_access(option: str, path: Path, there: Path) -> None:
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise ConfigError(f"{option} {path}: this account may not write to {there}; name another place.")


def say_next(*commands: str) -> None:
    """Print what a person would type next."""
    typer.echo("\nNext:" + "".join(f"\n  {command}" for command in commands))
