"""Reference pages: the commands from click's tree, the recipe's fields from the schema of its records."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import click

import sfd
from sfd.cli.main import main
from sfd.run.recipe import Recipe
from sfd.schedule import SCHEDULES
from sfd.solvers import SOLVERS
from sfd.training.tasks import TASKS
from sfd.utils import registry
from sfd.utils.config import options_record

RANGES = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
Schema = dict[str, Any]


def code_modules() -> set[str]:
    """Modules of the public interface."""
    public = {sfd._HOME[name] for name in sfd.__all__}
    return public | {"sfd.editing.edits", "sfd.editing.follow", "sfd.diffusers.pipeline", "sfd.diffusers.scheduler"}


def commands() -> str:
    """A page with the help of every command."""
    parts = ["# Commands", _help(main)]
    for name, command in main.commands.items():
        context = click.Context(command, info_name=name)
        usage = " ".join(["sfd", name, *command.collect_usage_pieces(context)])
        parts += [f"## sfd {name}", f"```text\n{usage}\n```", _help(command)]
        options = [param for param in command.params if isinstance(param, click.Option)]
        records = [record for option in options if (record := option.get_help_record(context))]
        rows = [(f"`{names}`", text.replace("[", r"\[")) for names, text in records]
        parts += [_table(("option", "meaning"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command) -> str:
    """A command's help; click's mark for a text that keeps its lines becomes a block."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    kept = [f"```text\n{p.removeprefix(chr(8)).strip(chr(10))}\n```" if p.startswith("\b") else p for p in paragraphs]
    return "\n\n".join(kept)


def recipe_fields() -> str:
    """A page with all fields of a recipe, one section per record."""
    schema = Recipe.model_json_schema()
    records = {"Recipe": schema, **schema.pop("$defs")}
    places: dict[str, list[str]] = {}
    for name, place in _places(records, "Recipe", ""):
        places.setdefault(name, []).append(place)
    parts = [
        "# Recipe fields",
        "A recipe is a YAML file; `extends: OTHER.yaml` starts from another one. On the command line `FIELD=VALUE` "
        "overrides a field: `train.steps=500`, `schedule='{name: synchronous}'`. Ranges are checked before a run. "
        "[Recipes](../recipes.md) lists the files that come with the project.",
    ]
    parts += ["## The whole recipe", _fields(schema, "")]
    for name, where in places.items():
        parts += [f"## {name}", "Of " + ", ".join(f"`{place}`" for place in where) + "."]
        parts += [records[name].get("description", "").split("\n\n")[0], _fields(records[name], "")]
    return "\n\n".join([*parts, *_named()]) + "\n"


def _named() -> Iterator[str]:
    """Settings of what is chosen by name: schedules, solvers, encoders."""
    yield "## By name"
    yield "Schedules, solvers and encoders have settings of their own."
    for name, make in SCHEDULES.items():
        yield f"### Schedule {name}"
        yield _fields(options_record(make).model_json_schema(), "schedule.")
    for name, solver in SOLVERS.items():
        yield f"### Solver {name}"
        yield _fields(options_record(solver.solve).model_json_schema(), "sample.options.")
    for name in registry.names("sfd.encoders"):
        yield f"### Encoder {name}"
        yield _fields(registry.find("sfd.encoders", name, "encoder").Config.model_json_schema(), "config.")
        if name in TASKS:
            yield _fields(TASKS[name].Objective.model_json_schema(), "objective.")


def _places(records: dict[str, Schema], name: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Each record with the dotted fields that hold it."""
    for field, schema in records[name].get("properties", {}).items():
        for inner in _references(schema):
            yield inner, prefix + field
            yield from _places(records, inner, f"{prefix}{field}.")


def _references(schema: Schema) -> list[str]:
    values = schema.get("additionalProperties")
    kinds = [schema, *schema.get("anyOf", ()), *([values] if isinstance(values, dict) else ())]
    return [kind["$ref"].rpartition("/")[2] for kind in kinds if "$ref" in kind]


def _fields(schema: Schema, prefix: str) -> str:
    """A table of a record's fields."""
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(field)
        rows.append((f"`{prefix}{name}`", _type(field), default, field.get("description", "")))
    return _table(("field", "type", "default", "meaning"), rows) if rows else "No settings."


def _default(field: Schema) -> str:
    value = field.get("default")
    return "see there" if isinstance(value, dict) and value and _references(field) else f"`{json.dumps(value)}`"


def _type(schema: Schema) -> str:
    """A JSON schema's type in words, with its range."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        parts = schema.get("prefixItems")
        return f"list of {' and '.join(map(_type, parts))}" if parts else f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"mapping of names to {_type(values)}" if isinstance(values, dict) else "mapping"
    limits = [f"{sign} {schema[key]:g}" for key, sign in RANGES.items() if key in schema]
    return " ".join([schema.get("type", "anything"), *limits])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)])
