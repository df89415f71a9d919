"""Published models in the formats of diffusers and transformers: a folder, or a name on the Hugging Face hub.

A name is looked up in the hub's local cache first; only what is not there is downloaded (`HF_HUB_OFFLINE=1` forbids
it). Weights must be safetensors: pickled ones can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from sfd.utils import files, hub
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError

CONFIG_FILE = "config.json"

ConfigType = TypeVar("ConfigType", bound=Settings)


def local(source: str) -> Path | None:
    """Find a folder, or a hub name's copy in the local cache; None if neither is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(source).is_dir():
        return Path(source)
    try:
        cached = try_to_load_from_cache(source, CONFIG_FILE)
    except HFValidationError:  # a path, not a name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def fetch(source: str, weights: str) -> Path:
    """Give the folder that holds a model's `config.json` and safetensors, downloaded if it is not on this machine.

    Args:
        source: a folder, or a hub name.
        weights: file name of the weights, without `.safetensors`.
    """
    pattern, folder = f"{weights}*.safetensors", local(source)
    if folder is None or not (Path(source).is_dir() or any(folder.glob(pattern))):
        folder = hub.fetch(source, allow_patterns=[CONFIG_FILE, pattern, f"{pattern}.index.json"])
    found = sorted(folder.glob(pattern))
    if not found:
        raise SFDError(
            f"{source} has no weights in {weights}.safetensors; fetch or convert them (pickled ones can run code, and "
            "are not read)"
        )
    for path in found:
        if reason := files.failed_download(path):
            raise SFDError(f"{path} is {reason}")
    return folder


def absent(source: str) -> SFDError:
    """Build the error for a model that is not on this machine."""
    return SFDError(
        f"{source} is neither a folder nor in the hub's local cache; give a folder, or the name of a model on the hub, "
        f"and run `hf download {source}` where there is a network"
    )


def expected(source: str, given: Mapping[str, Any], found: Mapping[str, Any], kind: type[ConfigType]) -> ConfigType:
    """Join a published encoder's own configuration (`found`) with what a recipe says of it; they must agree."""
    config = parse(kind, {**given, **found}, source)
    for field, value in files.jsonable(given).items():
        actual = files.jsonable(getattr(config, field))
        if value != actual:
            raise SFDError(
                f"the recipe's config says {field} = {value}, but {source} has {actual}; leave the field out of "
                "`config`, or give another `pretrained`"
            )
    return config


def load(network: Any, folder: Path, **options: Any) -> Any:
    """Load a network by its library's `from_pretrained`, with every tensor accounted for."""
    from safetensors import SafetensorError

    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are reported
    try:
        net, found = network.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, **report, **options
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SFDError(f"{folder} cannot be loaded ({reason}); make or fetch its files again") from None
    # Heads and decoders may be left over, but nothing of the network itself.
    own = {name for name, _ in net.named_children()}
    unexpected = [name for name in found["unexpected_keys"] if name.partition(".")[0] in own]
    wrong = sorted(map(str, [*found["missing_keys"], *unexpected, *found["mismatched_keys"]]))
    if wrong:
        raise SFDError(
            f"{folder}: the weights do not fit {CONFIG_FILE} (missing, unexpected or of another shape: "
            f"{', '.join(wrong[:4])}); use the files of one model"
        )
    return net
