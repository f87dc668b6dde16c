"""Commands of provisioning: who takes part."""

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.options import Config, FirstByDefault, Kits, Site, say_next

provision_cli = typer.Typer(
    help="Certificates, keys and kits: who takes part.", no_args_is_help=True, cls=FirstByDefault
)


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
    """Make the federation's certificates and keys, and a kit for each site that the file lists; sign who takes part.

    `wardround provision FEDERATION.toml` does the same. A second run adds what is missing, overwrites nothing, and
    signs what the file says by now of sites and patience; a running coordinator takes that over between rounds.
    """
    from wardround.config import named, read_federation
    from wardround.provision import lines, prepare, provision

    federation = read_federation(config)
    with named(config):
        membership = (prepare if keys_at_sites else provision)(federation, out, address=address)
    typer.echo("\n".join(lines(out)))
    joining = [f"wardround provision sign SITE.csr --out {out}"] if keys_at_sites else []
    if not keys_at_sites and not membership.keys and not federation.membership.sites:
        joining = [f"wardround provision add SITE --out {out}   (for each site: the file's [membership] lists none)"]
    here = membership.address.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]")
    listen = "" if here else " --host 0.0.0.0"
    say_next(*joining, f"wardround coordinate {config} --kit {out}/coordinator --out runs/{federation.name}{listen}")


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
