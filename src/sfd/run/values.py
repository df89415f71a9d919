"""How a recipe's values are read: YAML, overrides of single fields, and fields of earlier recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from sfd.utils.config import field_owner, record_in
from sfd.utils.errors import SFDError

# Fields of earlier recipes and their present names.
RENAMED = {"loss.resting": "loss.stationary_streams", "evaluation.weak": "evaluation.guiding_model"}
# Fields that are gone: the value that changed nothing, and what to do in place of another one.
REMOVED: dict[str, tuple[Any, str]] = {
    "sample.budget": ("length", "steps are given to each interval by its length"),
    "sample.weak_every": (1, "the guiding model is evaluated each time; take fewer steps, or a guidance interval"),
    "sample.weak_between": ("hold", "the guiding model is evaluated each time"),
    "sample.paired": (None, "the null class is always evaluated in one call of twice the batch"),
}
for _train in ("texture.train", "semantic.train", "compressor.train", "train", "evaluation.classifier.training"):
    REMOVED[f"{_train}.parallel"] = ("auto", "several ranks always train with DistributedDataParallel")
    REMOVED[f"{_train}.max_rollbacks"] = (None, "a run stops after max_skipped steps; resume with train.data_offset=1")


def read_yaml(text: str) -> Any:
    """Read YAML, with numbers of YAML 1.2, such as 1e-4."""
    try:
        return yaml.load(text, Loader=_Loader)  # derived from SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # What the library meets in values that do not fit their tags, and in numbers of thousands of digits.
        raise yaml.YAMLError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """The safe loader, but numbers in scientific notation need no point, and dates are text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


def apply_override(values: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    """Set the field of a `kind` of record that `dotted.field=value` names: text as it stands, all else as YAML."""
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise SFDError(f"{override!r} is not an override; write field=value, such as train.steps=500")
    *parents, last = field.split(".")
    owner = field_owner(kind, parents)
    value = text if _is_text(owner, last, text) else _yaml_value(override, text)
    place = values
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise SFDError(f"{override!r}: {name!r} holds no fields of its own")
    if isinstance(value, str) and _is_named(owner, last):
        value = merge(place, {last: {"name": value}})[last]
    place[last] = value


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace fields of `base` recursively; a mapping with another `name` replaces the whole mapping."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value.get("name") in (None, before.get("name")):
            value = merge(before, value)
        merged[key] = value
    return merged


def write_out_names(values: dict[str, Any], kind: type[BaseModel]) -> None:
    """Put {name: X} where a record is given as its name X alone, as in `schedule: synchronous`."""
    for field, value in values.items():
        if isinstance(value, str) and _is_named(kind, field):
            values[field] = {"name": value}


def _is_named(owner: type[BaseModel] | None, field: str) -> bool:
    """Whether a field holds a record that a name selects (encoders, the compressor, the schedule)."""
    if owner is None or field not in owner.model_fields:
        return False
    inner = record_in(owner.model_fields[field].annotation)
    return field == "schedule" or (inner is not None and "name" in inner.model_fields)


def _yaml_value(override: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise SFDError(f"the value in {override!r} is not valid YAML; quote it if it has special characters") from None


def _is_text(owner: type[BaseModel] | None, field: str, text: str) -> bool:
    """Whether a value is text as it stands: YAML would cut "photos #1" and read "2024" as a number."""
    types = set()
    if owner is not None and field in owner.model_fields:
        annotation = owner.model_fields[field].annotation
        types = {getattr(kind, "__origin__", kind) for kind in get_args(annotation) or (annotation,)}  # PathText is str
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return str in types and types <= {str, NoneType} and not quoted and text not in ("null", "")


def follow_changes(values: dict[str, Any], where: str) -> None:
    """Give renamed fields their new names; drop removed ones that changed nothing, and refuse others."""
    for field, name in RENAMED.items():
        record, old = _record_of(values, field)
        if old in record:
            value = record.pop(old)
            if value is not None:  # null is the default, which need not be given
                record[name.rpartition(".")[2]] = value
    for field, (harmless, instead) in REMOVED.items():
        record, old = _record_of(values, field)
        if old in record:
            value = record.pop(old)
            if harmless is not None and value != harmless:
                raise SFDError(f"{where}: field {field!r} was removed ({instead}); take {value!r} out")


def _record_of(values: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """Find the record that a dotted name's last field is in; an empty one if there is none."""
    *parents, last = field.split(".")
    record: Any = values
    for name in parents:
        record = record.get(name) if isinstance(record, dict) else None
    return (record if isinstance(record, dict) else {}), last
