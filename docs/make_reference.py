"""Write docs/commands.md and docs/config.md from the code: `make docs`. A test keeps them true."""

from collections.abc import Iterator
from pathlib import Path

import click
import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic_core import PydanticUndefined

from wardround.cli import cli
from wardround.config import FederationConfig, SiteConfig, Strict
from wardround.config.strict import kind_of, models_in

HERE = Path(__file__).parent
SIGNS = {Ge: ("at least", "ge"), Gt: ("above", "gt"), Le: ("at most", "le"), Lt: ("below", "lt")}


def commands() -> str:
    """Return every command with its arguments and options."""
    lines = ["# Commands", "", "Written by `make docs` from the code. `wardround COMMAND --help` says the same.", ""]
    for name, command in _walk(typer.main.get_command(cli), "wardround"):
        lines += [f"## `{name}`", "", (command.help or "").strip(), ""]
        for parameter in command.params:
            if parameter.name in ("help", "install_completion", "show_completion"):
                continue
            kind = parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name
            record = parameter.get_help_record(click.Context(command)) or ("", "")
            lines.append(f"- `{kind}`: {record[1].split('  ')[0]}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def config() -> str:
    """Return every key of both files with its type, its range, its default and its sentence."""
    lines = ["# Configuration", "", "Written by `make docs` from the code. Unknown keys are refused.", ""]
    for title, model in (("The federation's file", FederationConfig), ("The site's own file, `site.toml`", SiteConfig)):
        lines += [f"## {title}", "", (model.__doc__ or "").strip().split("\n")[0], ""]
        lines += _section(model, "")
    return "\n".join(lines).rstrip() + "\n"


def _section(model: type[Strict], name: str, chosen: str = "") -> list[str]:
    lines = [f"### `[{name}]{chosen}`", "", (model.__doc__ or "").strip().split("\n")[0], ""] if name else []
    parts = []
    for key, field in model.model_fields.items():
        if inner := models_in(field.annotation):
            for kind in inner:
                key_of_kind, kinds = kind_of(kind)
                known = " or ".join(f'"{one}"' for one in kinds)
                chosen = f" {key_of_kind} = {known}" if len(inner) > 1 else ""
                parts += _section(kind, f"{name}.{key}" if name else key, chosen)
            continue
        default = "required" if field.default is PydanticUndefined else f"default `{field.default!r}`"
        bounds = [(*SIGNS[type(bound)], bound) for bound in field.metadata if type(bound) in SIGNS]
        limits = "".join(f", {words} {getattr(bound, name)}" for words, name, bound in bounds)
        lines.append(f"- `{key}` ({default}{limits}): {field.description}")
    return [*lines, "", *parts]


def _walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for child, inner in sorted(command.commands.items()):
            yield from _walk(inner, f"{name} {child}")
    else:
        yield name, command


if __name__ == "__main__":
    (HERE / "commands.md").write_text(commands())
    (HERE / "config.md").write_text(config())
