"""The command `wardround`: a module for each who types it, one function a command, no logic.

A command reads the files that a person wrote before it imports torch: a slip is told at once.
"""

import os
import sys
from typing import Annotated

import typer

from wardround import __version__
from wardround.cli import downstream, federation, registry
from wardround.cli.provisioning import provision_cli
from wardround.cli.site import site_cli
from wardround.errors import WardroundError

cli = typer.Typer(
    help="Hospitals pretrain one imaging backbone together; no image leaves a hospital.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    federation.demo,
    federation.check,
    federation.simulate,
    federation.coordinate,
    federation.status,
    federation.report,
    federation.constants,
    registry.models,
    registry.pull,
    registry.register,
    registry.promote,
    registry.rollback,
    downstream.evaluate,
    downstream.segment,
    downstream.export,
    downstream.compress,
):
    cli.command()(command)
cli.add_typer(provision_cli, name="provision")
cli.add_typer(site_cli, name="site")


# What Ctrl-C leaves of a command; of others nothing is promised.
_GOES_ON = "; what is committed is kept: start the same command again to go on"
_NOTHING = "; nothing was written"
_MEASURED = "; nothing was written, unless results stand above"  # they are out before pictures are drawn
STOPPED = {
    "demo": _GOES_ON,
    "simulate": _GOES_ON,
    "coordinate": _GOES_ON,
    "site run": _GOES_ON,
    "check": _NOTHING,
    "report": _NOTHING,
    "export": _NOTHING,
    "compress": _NOTHING,
    "evaluate": _MEASURED,
    "segment": _MEASURED,
}


@cli.callback(invoke_without_command=True)
def root(
    debug: Annotated[bool, typer.Option(help="Show the trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", envvar="WARDROUND_LOG_JSON", help="Make each line a JSON object, in all logs too."),
    ] = False,
) -> None:
    """Options of every command."""
    if log_json:
        from wardround import logs

        logs.begin_prints()
    if version:
        typer.echo(f"wardround {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; a user's error is one line and exit 2, Ctrl-C says what it leaves and exits 130."""
    try:
        cli()
    except WardroundError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except PermissionError as error:  # of another account's files, as after a container's `chown`
        if "--debug" in sys.argv or error.filename is None:
            raise
        typer.echo(
            f"error: {error.filename}: {error.strerror}, for account {os.geteuid()}; take the account that owns it, or "
            "change its owner.",
            err=True,
        )
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            typer.echo(f"\nstopped{_left(sys.argv[1:])}.", err=True)
        raise


def _left(arguments: list[str]) -> str:
    """Return what an interrupted command left; `evaluate --federated` writes into the run, and promises nothing."""
    words = [one for one in arguments if not one.startswith("-")]
    found = STOPPED.get(" ".join(words[:2])) or STOPPED.get(words[0] if words else "", "")
    return "" if "--federated" in arguments else found
