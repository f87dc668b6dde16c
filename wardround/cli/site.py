"""Commands of a hospital site."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wardround.cli.options import Config, FirstByDefault, SiteFile, say_next

site_cli = typer.Typer(help="Commands of a hospital site.", no_args_is_help=True)
ledger_cli = typer.Typer(help="The site's privacy ledger.", no_args_is_help=True, cls=FirstByDefault)
site_cli.add_typer(ledger_cli, name="ledger")


@site_cli.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="Where the key stays; the kit's files come beside it.")],
    name: Annotated[str, typer.Option(help="The site's name in the federation.")],
) -> None:
    """Make this site's private key here, where it stays, and a request for the coordinator."""
    from wardround.provision.request import init
    from wardround.signatures import fingerprint

    request, key = init(folder, name)
    typer.echo(f"site '{name}': its key is {fingerprint(key)}; read that to the coordinator by telephone")
    say_next(f"send {request} to the coordinator, and put the kit that comes back into {folder}")


@site_cli.command("check")
def site_check(
    site: SiteFile,
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, for machines.")] = False,
) -> None:
    """Look at all that a round needs here: kit, images, connection, clock, certificates, time, disk, approval, ledger.

    Ends with 0 where all is well, 3 where there are warnings, 2 where there are problems.
    """
    from wardround.config import read_federation, read_site

    own, federation = read_site(site), read_federation(config)

    from wardround.client.check import check, raise_for, to_do, worst
    from wardround.report.tables import check_table, left_out_lines

    found, images = check(own, site, federation)
    lines = left_out_lines({own.name: images}, most=1000) if images else []
    if as_json:
        said = {"severity": worst(found), "findings": [one._asdict() for one in found], "left_out": lines}
        typer.echo(json.dumps(said, indent=1))
    else:
        Console().print(check_table(found))
        typer.echo("\n".join([*to_do(found), *lines]))
        agreed = {one.severity for one in found if one.what == "approval"}
        if own.coordinator is not None and agreed and worst(found) != "problem":
            say_next(f"wardround site run {site}" if agreed == {"well"} else f"wardround site approve {site} {config}")
    raise_for(found)
    if worst(found) == "warning":
        raise typer.Exit(3)


@site_cli.command("approve")
def site_approve(
    site: SiteFile,
    protocol: Annotated[
        str | None, typer.Argument(help="A digest, or its first 8 digits or more, or a federation's file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking, as in scripts.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take an approval back.")] = False,
    by: Annotated[str | None, typer.Option(help="Who agrees; default: this account.")] = None,
) -> None:
    """Show in plain words what a protocol does here, and approve it; without one, list what waits for approval."""
    from wardround.config import read_site

    own = read_site(site)

    from wardround.client import approval, policy
    from wardround.client.charge import ledger_of
    from wardround.report.agreement import agreement_table

    if protocol is None:
        typer.echo("\n".join(approval.lines(own)))
        return
    if withdraw:
        typer.echo(f"{approval.withdraw(own, protocol, by)} is not approved any more; no new round of it begins")
        return
    found = approval.find(own, protocol)
    Console().print(agreement_table(found, own, ledger_of(own).mechanisms()))
    for objection in policy.objections(own, found):
        typer.echo(f"though approved, it will be refused: {objection}")
    if not (yes or typer.confirm(f"Does site '{own.name}' agree to this?")):
        typer.echo("nothing is approved")
        raise typer.Exit(1)
    approval.approve(own, found, by)
    typer.echo(f"approved: {found.digest()}")
    if own.coordinator is not None:  # without one there is nobody to connect to
        say_next(f"wardround site run {site}")


@site_cli.command("run")
def site_run(site: SiteFile) -> None:
    """Connect this site to the coordinator and answer its rounds, until stopped."""
    from wardround.client.supervisor import run_site

    run_site(site)


@site_cli.command("log")
def site_log(
    site: SiteFile,
    last: Annotated[int, typer.Option(help="How many messages to show.", min=1)] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Show all of them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, for machines.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain alone, and say up to where it holds.")
    ] = False,
) -> None:
    """Print what came in and what left, newest last; check that nothing was altered or cut."""
    from wardround.client.audit import AuditLog
    from wardround.config import read_site
    from wardround.report.audit import audit_json, log_lines

    log = AuditLog(read_site(site).work)
    if not verify:
        rows = [row.flat() for row in log.rows()[0][0 if everything else -last :]]
        typer.echo(audit_json(rows) if as_json else "\n".join(log_lines(rows)))
    rows_held, heads = log.verified()
    if not as_json:
        typer.echo(f"The chain of {len(rows_held)} rows is whole, with {heads} heads that left with updates kept here.")


@ledger_cli.command("show")
def ledger_show(site: SiteFile) -> None:
    """Print the privacy ledger, check its chain, and say what is spent and how many rounds are left.

    `wardround site ledger SITE.toml` does the same.
    """
    from wardround.client.charge import ledger_of
    from wardround.config import read_site
    from wardround.report.ledger import ledger_lines, ledger_table

    own = read_site(site)
    ledger = ledger_of(own)
    rows = ledger.rows()
    Console().print(ledger_table(rows))
    typer.echo("\n".join(ledger_lines(rows, ledger.gaps(), own)))


@ledger_cli.command("recover")
def ledger_recover(site: SiteFile) -> None:
    """Charge what the ledger lacks after it was restored from a copy or deleted; rounds then go on."""
    from wardround.client.charge import recover
    from wardround.config import read_site
    from wardround.report.ledger import recovered_lines

    typer.echo("\n".join(recovered_lines(recover(read_site(site)))))
