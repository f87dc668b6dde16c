"""Commands of a federation: check a config, simulate one, coordinate one, see how it stands."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from wardround.cli.options import Config, Data, Out, Tracking, check_file, check_folder, default_tracking, say_next
from wardround.errors import ConfigError


def check(
    config: Config,
    digest: Annotated[bool, typer.Option("--digest", help="Print the protocol digest alone.")] = False,
    curve: Annotated[Path | None, typer.Option(help="Draw epsilon over rounds here, as PNG.")] = None,
) -> None:
    """Say what a config resolves to: protocol digest, sizes, bytes a round, memory, time, and privacy spent."""
    from wardround.config import named, read_federation

    federation = read_federation(config)
    check_file("--curve", curve)

    from wardround.plan import budgets, cost, resolve
    from wardround.report.curves import draw_epsilon
    from wardround.report.tables import budget_table, plan_table

    with named(config):
        plan = resolve(federation)
    if digest:
        typer.echo(plan.digest)
        return
    spent = budgets(plan.config)
    if curve is not None and not spent:
        raise ConfigError("--curve: draws epsilon, and this config spends none; add [privacy], or leave it out.")
    Console().print(plan_table(plan, cost(plan)))
    if spent:
        Console().print(budget_table(plan.config, spent))
        if curve is not None:
            draw_epsilon({site: budget.curve for site, budget in spent.items()}, curve, plan.config.name)


def simulate(
    config: Config,
    data: Data,
    out: Out,
    tracking: Tracking = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means all.")] = 0,
) -> None:
    """Run a whole federation in this process, over the sites of a folder."""
    from wardround.config import named, read_federation

    federation = read_federation(config)
    check_folder("--out", out)

    from wardround.report.tables import index_table, left_out_lines, rounds_table
    from wardround.simulate import index_sites, simulate

    console = Console()
    with named(config):
        sites = index_sites(federation, data, out, threads)
    console.print(index_table(sites))
    for line in left_out_lines(sites):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    with named(config):
        run = simulate(federation, data, out, tracking or default_tracking(), threads)
    console.print(rounds_table([run.record(n) for n in run.committed()[1:]]))
    measured = [f"wardround evaluate {out} --data {data}"] if (data / "labels.csv").exists() else []
    say_next(*measured, f"wardround report {out}", f"wardround pull {federation.name}@candidate --to backbone")


def demo(out: Out = Path("runs/demo"), tracking: Tracking = None) -> None:
    """Run the main job on three procedural hospitals, from DICOM to a probe, in about three minutes."""
    check_folder("--out", out)
    from wardround.demo import run_demo

    run_demo(out, tracking or default_tracking(), Console())


def constants(config: Config, data: Data) -> None:
    """Compute the mean and std of a config's data section on a public labelled folder."""
    from wardround.config import read_federation

    federation = read_federation(config)

    from wardround.data import channel_constants

    mean, std = channel_constants(data, federation.data)
    typer.echo(f"mean = {[round(value, 4) for value in mean]}\nstd = {[round(value, 4) for value in std]}")


def coordinate(
    config: Config,
    kit: Annotated[Path, typer.Option(help="The coordinator's folder that `provision` wrote.")],
    out: Out,
    port: Annotated[
        int | None,
        typer.Option(
            help="The port to listen on for sites; default: that of the address in the kits.", min=1, max=65535
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on for sites; 0.0.0.0 where they are on other machines.")
    ] = "127.0.0.1",
    tracking: Tracking = None,
    metrics: Annotated[
        int | None,
        typer.Option(help="Serve Prometheus metrics on this port of loopback; default: none.", min=1, max=65535),
    ] = None,
) -> None:
    """Start the coordinator's server and run the federation's rounds with the sites that connect."""
    from wardround.config import read_federation
    from wardround.server.membership import read_membership
    from wardround.server.metrics import serving
    from wardround.server.superlink import coordinate

    name = read_federation(config).name
    check_folder("--out", out)
    port = port or int(read_membership(kit).address.rpartition(":")[2])
    with serving(out, metrics):
        coordinate(config, kit, out, port, tracking or default_tracking(), host)
    say_next(
        f"wardround report {out}",
        f"wardround evaluate {out} --data A_LABELLED_FOLDER",
        f"wardround promote {name}@candidate --by YOU --why REASON",
    )


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


def report(
    run: Annotated[Path, typer.Argument(help="A run folder: the --out of `coordinate` or `simulate`.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; default: report.html in the run folder.")] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="What `wardround evaluate --out` wrote of the run's release. May be repeated."),
    ] = None,
) -> None:
    """Write one HTML page with pictures of a federation: what it learned, spent and cost, and what joining brought."""
    check_file("--out", out)
    from wardround.server.report import write_report

    page, kept = write_report(run, out, scores or ())
    typer.echo(f"{page} is written; {kept}")
    say_next(f"xdg-open {page}")
