"""One way to read a TOML file into a frozen model, and to say in one line what is wrong with it."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from wardround.errors import ConfigError

# What may name a site or a federation: it becomes a file name, so no separators and no leading dot.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
NAMES = "letters from A to Z, digits, '.', '_' and '-', at most 63 of them, a letter or digit first"
Name = Annotated[str, StringConstraints(pattern=NAME)]


class Strict(BaseModel):
    """A frozen part of a config that refuses keys it does not know and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=Strict)


def read_toml(path: Path, model: type[Model]) -> Model:
    """Return the model that a TOML file describes.

    Raises ConfigError, in one line, for a file that is missing, is no TOML, or does not fit.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from error
    return parse(raw, model, str(path))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the name of a file before an error that is of one of its sections, as `[backbone] name = 'x': …` is."""
    try:
        yield
    except ConfigError as error:
        if not str(error).startswith("["):
            raise
        raise ConfigError(f"{path}: {error}") from error


def parse(raw: dict[str, Any], model: type[Model], where: str) -> Model:
    """Return the model that a dictionary describes; `where` names its origin in errors."""
    try:
        # By way of JSON: strict there still takes a list for a tuple and a text for a date.
        return model.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        # A misspelt key first: that another is missing, as likely as not, is the same mistake.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        rest = f" (mistakes besides this one: {len(problems) - 1})" if len(problems) > 1 else ""
        found = f"{_problem(problems[0], model)}{rest}"
        raise ConfigError(f"{where}: {found}{'' if found.endswith('?') else '.'}") from error


def digest(model: Strict) -> str:
    """Return the SHA-256 of a model as canonical JSON: 64 hexadecimal digits."""
    text = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _problem(problem: Any, model: type[Strict]) -> str:
    """Return one validation error as who, found, expected, remedy."""
    model, path = _section(model, [str(part) for part in problem["loc"]] or ["the file"])
    *parents, key = path
    section = f"[{'.'.join(parents)}] " if parents else ""
    if problem["type"] == "extra_forbidden":
        known = list(model.model_fields)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{section}unknown key '{key}'; {remedy}"
    if problem["type"] == "union_tag_not_found":  # a section that `loc` names whole lacks the key that tells its kind
        return f"[{'.'.join(path)}] the key {problem['ctx']['discriminator']} is missing; add it"
    if problem["type"] == "union_tag_invalid":
        found, tags = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(found, tags, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(tags)}"
        return f"[{'.'.join(path)}] {problem['ctx']['discriminator'].strip(chr(39))} = '{found[:80]}': {remedy}"
    if problem["type"] == "missing":
        return f"{section}the key '{key}' is missing; add it"
    if problem["type"] == "value_error":  # raised by a validator of the section that `loc` names whole
        return f"[{'.'.join([*parents, key])}] {problem['msg'].removeprefix('Value error, ')}"
    if key == "format" and not parents:
        return f"is of format {problem['input']}; this Wardround reads format 1. Use the release that wrote it"
    found = json.dumps(problem["input"], default=str)
    field = model.model_fields.get(key)
    if problem["type"] == "string_pattern_mismatch" and problem["ctx"]["pattern"] == NAME:
        return f"{section}{key} = {found[:80]}: expected {NAMES}"
    if problem["type"] == "string_pattern_mismatch" and field and field.description:
        return f"{section}{key} = {found[:80]}: has not the form of what it is for: {field.description.rstrip('.')}"
    expected = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{section}{key} = {found[:80]}: {expected}"


def _section(model: type[Strict], loc: list[str]) -> tuple[type[Strict], list[str]]:
    """Return the model that holds the last key of an error's location, and the keys as the file has them."""
    path: list[str] = []
    inner: dict[str, type[Strict]] = {}  # the models that the key before leads to, by their kind
    for key in loc:
        if key in inner and len(inner) > 1:  # pydantic puts the kind of a section after its key; the file does not
            inner = {key: inner[key]}
            continue
        model = next(iter(inner.values()), model)
        path.append(key)
        field = model.model_fields.get(key)
        within = models_in(field.annotation) if field else []
        inner = {kind: found for found in within for kind in kind_of(found)[1]}
    return model, path


def models_in(annotation: Any) -> list[type[Strict]]:
    """Return the Strict models inside an annotation such as `Part | None` or `tuple[Part, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, Annotated):
        return [model for argument in get_args(annotation) for model in models_in(argument)]
    return []


def kind_of(model: type[Strict]) -> tuple[str, tuple[str, ...]]:
    """Return the key that tells a section's kind and the values for which it is this model; ("", ("",)) without."""
    for key in ("name", "unit"):
        field = model.model_fields.get(key)
        if field and get_origin(field.annotation) is Literal:
            return key, get_args(field.annotation)
    return "", ("",)
