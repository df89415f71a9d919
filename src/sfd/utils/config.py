"""The base of every configuration record: frozen, typed, unknown fields refused with the nearest right name."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sfd.utils.errors import SFDError, unknown


class _Free:
    """Marks the type of a field; see `Free`."""


Value = TypeVar("Value")
Free = Annotated[Value, _Free()]
"""The type of a field that does not change a result: it may differ between a stopped run and its resumption."""


class Settings(BaseModel):
    """A frozen record whose fields are its whole configuration: what is saved is what was constructed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    def fixed(self) -> dict[str, Any]:
        """Give the fields that a result depends on, all but those of type `Free`, as JSON values."""
        fields = type(self).model_fields.items()
        kept = [name for name, field in fields if not any(isinstance(m, _Free) for m in field.metadata)]
        return {name: _fixed(getattr(self, name)) for name in kept}


def _fixed(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.fixed()
    if isinstance(value, dict):
        return {key: _fixed(inner) for key, inner in value.items()}
    return [_fixed(inner) for inner in value] if isinstance(value, list | tuple) else value


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Find the first field in which two nested JSON values differ: its dotted name and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else (name, before, now)


SettingsType = TypeVar("SettingsType", bound=BaseModel)


def parse(kind: type[SettingsType], values: Mapping[str, Any], where: str = "") -> SettingsType:
    """Validate plain values (from YAML or JSON) as `kind`.

    Args:
        kind: the record's class.
        values: field names to plain values; lists stand for tuples.
        where: what is being read ("recipe.yaml", "model.json"), named first in the message.
    """
    try:
        # Validation from JSON takes lists for tuples and stays strict otherwise: "3" is no integer.
        return kind.model_validate_json(json.dumps(dict(values)))
    except (ValidationError, TypeError, ValueError) as error:
        raise explain(error, kind, where) from None


@cache
def options_record(function: Callable[..., Any]) -> type[Settings]:
    """Make the record of a function's keyword-only arguments, with their types, ranges (`Annotated`) and defaults."""
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], ... if argument.default is inspect.Parameter.empty else argument.default)
        for name, argument in inspect.signature(function).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(function.__name__, __base__=Settings, **fields)


def explain(error: Exception, kind: type[BaseModel], where: str = "") -> SFDError:
    """Say in a sentence what validation found wrong; `kind` is the record that was validated."""
    prefix = f"{where}: " if where else ""
    if not isinstance(error, ValidationError):
        return SFDError(f"{prefix}{error}")
    # A misspelt field is unknown under one name and missing under another; the first says more.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Where a choice of names is one of several types, its place ends in that type.
    location = [str(part) for part in first["loc"] if not str(part).startswith("literal[")]
    field = ".".join(location)
    if first["type"] == "extra_forbidden":
        parent = field_owner(kind, location[:-1])
        choices = list(parent.model_fields) if parent else []
        return SFDError(f"{prefix}field {field!r}: {unknown('field', location[-1], choices)}")
    if first["type"] == "missing":
        return SFDError(f"{prefix}field {field!r} is missing; add it")
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall("'([^']+)'", first["ctx"]["expected"])
        return SFDError(f"{prefix}field {field!r}: {unknown(location[-1], first['input'], choices)}")
    if first["type"] == "value_error":  # a validator's own sentence
        return SFDError(f"{prefix}{f'field {field!r}: ' if field else ''}{first['ctx']['error']}")
    given = json.dumps(first["input"], default=str)[:80]
    return SFDError(f"{prefix}field {field!r}: {first['msg']}, but {given} was given")


def field_owner(kind: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """Follow field names down to the record that holds the last of them."""
    owner: type[BaseModel] | None = kind
    for name in location:
        if owner is None or name not in owner.model_fields:
            return owner
        annotation = owner.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        owner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return owner
