"""The base of every configuration record: frozen, typed, unknown fields refused with the nearest right name."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, create_model

from sfd.utils.errors import SFDError, unknown
from sfd.utils.paths import expand_home


class _Free:
    """Marks the type of a field; see `Free`."""


Value = TypeVar("Value")
Free = Annotated[Value, _Free()]
"""The type of a field that does not change a result: it may differ between a stopped run and its resumption."""


PathText = Annotated[str, AfterValidator(expand_home)]
"""The type of a field that names a file or folder, or something else in its place: `~` is expanded."""


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


def with_defaults(before: Mapping[str, Any], now: Mapping[str, Any], kind: type[BaseModel] | None) -> dict[str, Any]:
    """Add to fields that were recorded earlier those of `now` that did not exist then, with the defaults of `kind`."""
    complete = dict(before)
    for name, value in now.items():
        field = kind.model_fields.get(name) if kind is not None else None
        inner = kind if field is None else record_in(field.annotation)  # streams are records by name
        if name not in before and field is not None and not field.is_required():
            complete[name] = json.loads(json.dumps(_fixed(field.get_default(call_default_factory=True))))
        elif isinstance(value, dict) and isinstance(before.get(name), dict):
            complete[name] = with_defaults(before[name], value, inner)
    return complete


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
        return SFDError(prefix + _no_such_field(kind, field, first["input"]))
    if first["type"] == "missing":
        return SFDError(f"{prefix}field {field!r} is missing; add it")
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = re.findall("'([^']+)'", first["ctx"]["expected"])
        return SFDError(f"{prefix}field {field!r}: {unknown(location[-1], first['input'], choices)}")
    if first["type"] == "value_error":  # a validator's own sentence
        return SFDError(f"{prefix}{f'field {field!r}: ' if field else ''}{first['ctx']['error']}")
    given = json.dumps(first["input"], default=str)[:80]
    if first["type"] in ("model_type", "model_attributes_type"):
        inner = field_owner(kind, location)
        some = next(iter(inner.model_fields), "") if inner is not None else ""
        outer = field_owner(kind, location[:-1])
        types = get_args(outer.model_fields[location[-1]].annotation) if outer is not None else ()
        none = ", or null for none" if type(None) in types else ""
        return SFDError(
            f"{prefix}{field!r} holds fields of its own, but {given} was given; set one, as {field}.{some}{none}"
        )
    message = first["msg"].replace("Input should be", "should be").replace("an object", "a mapping of names to values")
    return SFDError(f"{prefix}field {field!r} {message.replace('a valid array', 'a list')}, but {given} was given")


def field_owner(kind: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """Follow field names down to the record that holds the last of them."""
    owner: type[BaseModel] | None = kind
    for name in location:
        if owner is None or name not in owner.model_fields:
            return owner
        owner = record_in(owner.model_fields[name].annotation)
    return owner


def record_in(annotation: Any) -> type[BaseModel] | None:
    """The record that a field of this type may hold."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _no_such_field(kind: type[BaseModel], field: str, value: Any) -> str:
    while isinstance(value, dict) and len(value) == 1:  # sampling={guidance: 2} means sampling.guidance
        ((name, value),) = value.items()
        field += f".{name}"
    similar = _similar_fields(kind, field)
    if similar:
        return f"there is no field {field!r}; did you mean {' or '.join(map(repr, similar))}?"
    owner = field_owner(kind, field.split(".")[:-1])
    known = ", ".join(sorted(owner.model_fields)) if owner is not None else ""
    return f"there is no field {field!r} (known: {known or 'none'})"


def _similar_fields(kind: type[BaseModel], given: str) -> list[str]:
    """Find what a wrong name may mean: fields of this name elsewhere, of a similar name, or with these initials."""
    last = given.rpartition(".")[2]
    ends = {field: field.rpartition(".")[2] for field in _fields(kind)}
    initials = [end for end in ends.values() if "".join(word[:1] for word in end.split("_")) == last]  # lr, bs
    meant = {last, *initials, *difflib.get_close_matches(last, sorted(set(ends.values())), n=1, cutoff=0.65)}
    return difflib.get_close_matches(given, [field for field, end in ends.items() if end in meant], n=3, cutoff=0.0)


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Name all fields of a record and of the records in it, dotted."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        inner = record_in(field.annotation)
        if inner is not None:
            yield from _fields(inner, f"{prefix}{name}.")
