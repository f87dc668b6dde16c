"""The command `wardround`: one function a command, no logic."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console
from typer.core import TyperGroup

from wardround import __version__
from wardround.errors import WardroundError

cli = typer.Typer(
    help="Hospitals pretrain one imaging backbone together; no image leaves a hospital.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
site_cli = typer.Typer(help="Commands of a hospital site.", no_args_is_help=True)
cli.add_typer(site_cli, name="site")


class FirstByDefault(TyperGroup):
    """`wardround site ledger SITE.toml` is short for `wardround site ledger show SITE.toml`: its first command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the command where only a file is named."""
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else [next(iter(self.commands)), *args])


ledger_cli = typer.Typer(help="The site's privacy ledger.", no_args_is_help=True, cls=FirstByDefault)
site_cli.add_typer(ledger_cli, name="ledger")
provision_cli = typer.Typer(
    help="Certificates, keys and kits: who takes part.", no_args_is_help=True, cls=FirstByDefault
)
cli.add_typer(provision_cli, name="provision")

Config = Annotated[Path, typer.Argument(help="A federation's file, such as federation_configs/smoke.toml.")]
Data = Annotated[Path, typer.Option(help="A labelled folder (labels.csv), or a folder with one folder a site.")]
Out = Annotated[Path, typer.Option(help="The run folder; an unfinished run in it goes on.")]
Tracking = Annotated[
    str | None,
    typer.Option(help="MLflow's address; default: $MLFLOW_TRACKING_URI, else an SQLite file in runs/."),
]
Kits = Annotated[Path, typer.Option(help="Where the kits are: the coordinator's folder and one a site.")]
Site = Annotated[str, typer.Argument(help="The site's name.")]
SiteFile = Annotated[Path, typer.Argument(help="The site's own site.toml.")]


@cli.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", envvar="WARDROUND_LOG_JSON", help="Make each line a JSON object, in all logs too."),
    ] = False,
) -> None:
    """Options of every command."""
    context.obj = debug
    if log_json:
        from wardround import logs

        logs.begin_prints()
    if version:
        typer.echo(f"wardround {__version__}")
        raise typer.Exit


@cli.command()
def check(
    config: Config,
    digest: Annotated[bool, typer.Option("--digest", help="Print the protocol digest alone.")] = False,
    curve: Annotated[Path | None, typer.Option(help="Draw epsilon over rounds here, as PNG.")] = None,
) -> None:
    """Say what a config resolves to: protocol digest, sizes, bytes a round, memory, time, and privacy spent."""
    from wardround.config import FederationConfig, read_toml
    from wardround.plan import budgets, cost, resolve
    from wardround.report.curves import draw_epsilon
    from wardround.report.tables import budget_table, plan_table

    plan = resolve(read_toml(config, FederationConfig))
    if digest:
        typer.echo(plan.digest)
        return
    Console().print(plan_table(plan, cost(plan)))
    if spent := budgets(plan.config):
        Console().print(budget_table(plan.config, spent))
        if curve is not None:
            draw_epsilon({site: budget.curve for site, budget in spent.items()}, curve, plan.config.name)


@cli.command()
def simulate(
    config: Config,
    data: Data,
    out: Out,
    tracking: Tracking = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means all.")] = 0,
) -> None:
    """Run a whole federation in this process, over the sites of a folder."""
    from wardround.config import FederationConfig, read_toml
    from wardround.report.tables import index_table, left_out_lines, rounds_table
    from wardround.simulate import index_sites, simulate

    federation = read_toml(config, FederationConfig)
    console = Console()
    sites = index_sites(federation, data, out, threads)
    console.print(index_table(sites))
    for line in left_out_lines(sites):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    run = simulate(federation, data, out, tracking or default_tracking(), threads)
    console.print(rounds_table([run.record(n) for n in run.committed()[1:]]))
    measured = [f"wardround evaluate {out} --data {data}"] if (data / "labels.csv").exists() else []
    say_next(*measured, f"wardround pull {federation.name}@candidate --to backbone")


@cli.command()
def demo(out: Out = Path("runs/demo"), tracking: Tracking = None) -> None:
    """Run the main job on three procedural hospitals, from DICOM to a probe, in about three minutes."""
    from wardround.demo import run_demo

    run_demo(out, tracking or default_tracking(), Console())


@cli.command()
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


@cli.command()
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


@cli.command()
def models(tracking: Tracking = None) -> None:
    """List the registered backbones."""
    from wardround.registry.mlflow_store import Store
    from wardround.report.tables import models_table

    Console().print(models_table(Store(tracking or default_tracking()).models()))


@cli.command()
def constants(config: Config, data: Data) -> None:
    """Compute [data] mean and std on a public labelled folder, to be declared in a config."""
    from wardround.config import FederationConfig, read_toml
    from wardround.data import channel_constants

    mean, std = channel_constants(data, read_toml(config, FederationConfig).data)
    typer.echo(f"mean = {[round(value, 4) for value in mean]}\nstd = {[round(value, 4) for value in std]}")


@provision_cli.command("kits")
def provision_kits(
    config: Config,
    out: Kits = Path("kits"),
    address: Annotated[
        str | None,
        typer.Option(
            help="host:port at which sites reach the coordinator; default: as before, else the first of the file's "
            "server_names, at 8500."
        ),
    ] = None,
    keys_at_sites: Annotated[
        bool, typer.Option("--keys-at-sites", help="Make no site's key: each makes its own, and sends a request.")
    ] = False,
) -> None:
    """Make the federation's certificates and keys, and a kit for each site; sign who takes part.

    `wardround provision FEDERATION.toml` does the same. A second run adds what is missing, overwrites nothing, and
    signs what the file says by now of sites and patience; a running coordinator takes that over between rounds.
    """
    from wardround.config import FederationConfig, read_toml
    from wardround.provision import lines, prepare, provision

    federation = read_toml(config, FederationConfig)
    (prepare if keys_at_sites else provision)(federation, out, address=address)
    typer.echo("\n".join(lines(out)))
    requests = [f"wardround provision sign SITE.csr --out {out}"] if keys_at_sites else []
    say_next(*requests, f"wardround coordinate {config} --kit {out}/coordinator --out runs/{federation.name}")


@provision_cli.command("sign")
def provision_sign(
    request: Annotated[Path, typer.Argument(help="What `wardround site init` wrote at the site.")],
    out: Kits = Path("kits"),
) -> None:
    """Make the kit of a site that made its key itself: no private key travels."""
    from wardround.provision import answer, lines

    kit = answer(out, request)
    typer.echo("\n".join(lines(out)))
    say_next(f"hand over {kit}")


@provision_cli.command("add")
def provision_add(site: Site, out: Kits = Path("kits")) -> None:
    """Make one more site's key and kit; who was revoked comes back so, with a new key."""
    from wardround.provision import add, lines

    kit = add(out, site)
    typer.echo("\n".join(lines(out)))
    say_next(f"hand over {kit}")


@provision_cli.command("revoke")
def provision_revoke(site: Site, out: Kits = Path("kits")) -> None:
    """Take a site's key back for good: a running coordinator cuts it off within seconds, and goes on without it."""
    from wardround.provision import lines, revoke

    revoke(out, site)
    typer.echo("\n".join(lines(out)))
    say_next(f"wardround provision add {site} --out {out}   (only to let it in again, with a new key)")


@provision_cli.command("rotate")
def provision_rotate(
    who: Annotated[str | None, typer.Argument(help="A site, or its request; without it, the server.")] = None,
    out: Kits = Path("kits"),
) -> None:
    """Make a new certificate for the server, or a new key and kit for a site; the others notice nothing."""
    from wardround.provision import lines, renew, rotate

    kit = renew(out) if who is None else rotate(out, who)
    typer.echo("\n".join(lines(out)))
    say_next(f"hand over {kit}" if who else "a running coordinator takes the certificate over within seconds")


@cli.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run folder: the --out of `coordinate` or `simulate`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
) -> None:
    """Show how a federation stands: its sites, the open round, throughput, time left; live in a terminal."""
    from wardround.report.status import show, to_json
    from wardround.server.status import Watch

    watch = Watch(run)
    if as_json:
        typer.echo(to_json(watch.look()))
    else:
        show(watch.look, Console())


@cli.command()
def coordinate(
    config: Config,
    kit: Annotated[Path, typer.Option(help="The coordinator's folder that `provision` wrote.")],
    out: Out,
    port: Annotated[int, typer.Option(help="The port that sites connect to.", min=1, max=65535)] = 8500,
    host: Annotated[str, typer.Option(help="The address to listen on for sites; 0.0.0.0 for all.")] = "127.0.0.1",
    tracking: Tracking = None,
    metrics: Annotated[
        int | None,
        typer.Option(help="Serve Prometheus metrics on this port of loopback; default: none.", min=1, max=65535),
    ] = None,
) -> None:
    """Start the coordinator's server and run the federation's rounds with the sites that connect."""
    from wardround.server.metrics import serving
    from wardround.server.superlink import coordinate

    with serving(out, metrics):
        coordinate(config, kit, out, port, tracking or default_tracking(), host)
    say_next(f"wardround evaluate {out} --data A_LABELLED_FOLDER")


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
    from wardround.client.check import check, raise_for, to_do, worst
    from wardround.config import FederationConfig, read_site, read_toml
    from wardround.report.tables import check_table, left_out_lines

    own = read_site(site)
    found, images = check(own, site, read_toml(config, FederationConfig))
    lines = left_out_lines({own.name: images}, most=1000) if images else []
    if as_json:
        said = {"severity": worst(found), "findings": [one._asdict() for one in found], "left_out": lines}
        typer.echo(json.dumps(said, indent=1))
    else:
        Console().print(check_table(found))
        typer.echo("\n".join([*to_do(found), *lines]))
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
    from wardround.client import approval, policy
    from wardround.client.charge import ledger_of
    from wardround.config import read_site
    from wardround.report.agreement import agreement_table

    own = read_site(site)
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
    from wardround.report.audit import audit_json, audit_table

    log = AuditLog(read_site(site).work)
    if not verify:
        rows = [row.flat() for row in log.rows()[0][0 if everything else -last :]]
        typer.echo(audit_json(rows)) if as_json else Console().print(audit_table(rows))
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


def default_tracking() -> str:
    """Return where federations are tracked unless --tracking says otherwise."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def say_next(*commands: str) -> None:
    """Print what a person would type next."""
    typer.echo("\nNext:" + "".join(f"\n  {command}" for command in commands))


def main() -> None:
    """Run the command; a user's error is one line and exit 2, Ctrl-C says how to go on and exits 130."""
    try:
        cli()
    except WardroundError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            typer.echo("\nstopped; what is committed is kept: start the same command again to go on.", err=True)
        raise


if __name__ == "__main__":
    main()
