"""Published models in the formats of diffusers and transformers: in a folder, or by name in the hub's local cache.

What is on this machine is taken as it is, without asking the hub. Only names that a module lists are downloaded; any
other is said to be missing, so that a mistyped folder never becomes somebody's repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sfd.utils import files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError

CONFIG_FILE = "config.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")

ConfigType = TypeVar("ConfigType", bound=Settings)


class Format(NamedTuple):
    """How published models are read that one encoder module knows."""

    library: str
    """Whose format it is: "diffusers"."""
    weights: str
    """File name of the weights, without `.safetensors`."""
    architecture: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """Turns the contents of `config.json` (and the name of where they stand) into fields of the module's Config."""
    known: Mapping[str, Mapping[str, Any]]
    """Hub name → such fields, of models that can be planned with, and fetched, by name."""
    choices: tuple[str, ...] = ()
    """Fields of the Config that the caller chooses, whatever the model."""


def planned(source: str, given: Mapping[str, Any], config: type[ConfigType], format: Format) -> ConfigType:
    """Learn a published model's configuration without its weights; nothing is downloaded.

    Args:
        source: a folder, or a hub name.
        given: fields that the caller gives. Those that the model itself decides must agree with it; where the model is
            neither here nor known, they stand for it.
        config: the encoder's record.
        format: how its published models are read.

    Raises:
        SFDError: the model is not here, not known and not described, or it is another than described.
    """
    folder = _local(source)
    if folder is not None:
        where = str(folder / CONFIG_FILE)
        values: Mapping[str, Any] = format.architecture(files.read_json(folder / CONFIG_FILE, _what(format)), where)
    elif source in format.known:
        where, values = source, format.known[source]
    elif any(field not in format.choices for field in given):
        return parse(config, given, f"config of {source}")
    else:
        raise _absent(source, format)
    read = parse(config, {**given, **values}, where)
    for field, value in files.jsonable(given).items():
        found = files.jsonable(getattr(read, field))
        if value != found:
            raise SFDError(
                f"{source}: `config` says {field} = {value}, but {where} has {found}; "
                f"leave {field} out of `config`, or give another `pretrained`"
            )
    return read


def fetched(source: str, format: Format) -> Path:
    """Give the folder that holds a published model's `config.json` and safetensors weights.

    Raises:
        SFDError: it is not here and cannot be downloaded, or it has pickled weights only.
    """
    folder = _local(source)
    if folder is not None and _has_weights(folder, format):
        return folder
    if Path(source).is_dir():
        raise _without_weights(source, Path(source), format)
    if source not in format.known:
        raise _absent(source, format) if folder is None else _without_weights(source, folder, format)
    folder = _download(source, format)
    if not _has_weights(folder, format):
        raise _without_weights(source, folder, format)
    return folder


def is_here(source: str) -> bool:
    """Tell whether a folder, or a hub name's copy in the local cache, is on this machine."""
    return _local(source) is not None


def _local(source: str) -> Path | None:
    """Find a folder, or a hub name's copy in the local cache; None where neither is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(source).is_dir():
        return Path(source)
    try:
        cached = try_to_load_from_cache(source, CONFIG_FILE)
    except HFValidationError:  # a path, not a name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _download(source: str, format: Format) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = [CONFIG_FILE, f"{format.weights}.safetensors", f"{format.weights}.safetensors.index.json"]
    try:
        folder = snapshot_download(source, allow_patterns=[*wanted, f"{format.weights}-*-of-*.safetensors"])
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SFDError(f"{_absent(source, format)} (downloading it here failed: {reason})") from None
    return Path(folder)


def _has_weights(folder: Path, format: Format) -> bool:
    return any((folder / f"{format.weights}.safetensors{end}").is_file() for end in ("", ".index.json"))


def _what(format: Format) -> str:
    return f"model in the {format.library} format"


def _absent(source: str, format: Format) -> SFDError:
    needed = f"a folder with {CONFIG_FILE} and {format.weights}.safetensors in it"
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        return SFDError(f"{source} is neither a folder nor a model's name on the hub (OWNER/NAME); give {needed}")
    return SFDError(
        f"{source} is neither a folder nor a model in the hub's local cache; if it is a hub name, run "
        f"`hf download {source}` (https://huggingface.co/{source}), here or elsewhere and copy the files; "
        f"then give the name again, or {needed}"
    )


def _without_weights(source: str, folder: Path, format: Format) -> SFDError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        return SFDError(
            f"{source} has pickled weights only ({', '.join(pickled)}), which can run code and are not opened; "
            f"convert them to {format.weights}.safetensors, or fetch a copy that has it"
        )
    return SFDError(
        f"{source} has no weights: {format.weights}.safetensors is missing in {folder}; fetch the whole model, or, "
        "where only pickled weights are published, convert them"
    )
