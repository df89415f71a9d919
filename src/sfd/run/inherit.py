"""What a recipe takes from the model that `train.init` names: streams, schedule, size of the network, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfd.encoders import planned_encoder
from sfd.generation.directory import (
    COMPRESSOR_FOLDER,
    SEMANTIC_FOLDER,
    TEXTURE_FOLDER,
    ModelRecord,
    model_folder,
    read_record,
)
from sfd.latents import SEMANTIC, TEXTURE
from sfd.models.component import CONFIG_FILE
from sfd.utils import files
from sfd.utils.errors import SFDError

GUIDE_WEIGHT = 0.25  # of a second head that the model has
# What a recipe must name, but a model without a semantic stream does not use.
UNUSED = {"semantic": {"name": "convnet", "folder": "none"}, "compressor": {"name": "pca"}}


def model_defaults(init: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Values that hold where a recipe, whose own values are `own`, gives no others."""
    folder, record = _record(init)
    config, composite = record.transformer, record.transformer.composite
    texture = planned_encoder("", None, str(folder / TEXTURE_FOLDER), {})
    if config.flow_map:
        raise SFDError(f"train.init: {init} is distilled; fine-tune the model that it was distilled from")
    sample = record.sample.model_dump(mode="json")
    values: dict[str, Any] = {
        "data": {"image_size": composite[TEXTURE].grid * texture.downsample},
        "streams": {s.name: {"weight": s.weight, "patch_size": s.patch_size} for s in composite.streams},
        "schedule": record.schedule,
        "sample": sample,
    }
    if "size" not in (own.get("transformer") or {}):  # a named size is a whole network
        values["transformer"] = config.model_dump(include={"depth", "width", "heads", "prediction", "guide_block"})
        values["transformer"]["clocks"] = "streams" if config.clocks else "one"
    if config.guide_block is not None and "transformer" in values:
        values["loss"] = {"guide": GUIDE_WEIGHT}
    else:
        sample["guidance_from"] = "null_class"
    return values if SEMANTIC in composite.names else values | UNUSED


def take_tokenizers(values: dict[str, Any], init: str) -> None:
    """Put the model's tokenizers in place of those that a recipe would train."""
    folder, record = _record(init)
    streams = values.get("streams")
    wanted = streams if isinstance(streams, dict) else {}
    parts = [TEXTURE_FOLDER]
    if wanted.get(SEMANTIC) is not None and SEMANTIC in record.transformer.composite.names:
        parts += [SEMANTIC_FOLDER, COMPRESSOR_FOLDER]
    for part in parts:
        given = values.get(part) or {}
        if given.get("folder") is None and given.get("pretrained") is None:
            values[part] = _tokenizer(folder / part, init)


def _tokenizer(folder: Path, init: str) -> dict[str, Any]:
    """A recipe's section for a saved tokenizer."""
    if not (folder / CONFIG_FILE).exists():
        raise SFDError(
            f"train.init: {init} has no folder {folder.name}/, so it cannot encode new images; give the encoder and "
            "the compressor that made its latents (semantic.pretrained or semantic.folder, compressor.folder)"
        )
    about = files.read_json(folder / CONFIG_FILE, f"{folder.name} of a model")
    section = {"name": about["name"], "folder": str(folder)}
    if folder.name == COMPRESSOR_FOLDER:
        fields = {("channels" if name == "latent_channels" else name): v for name, v in about["config"].items()}
        del fields["input_channels"]
        section |= fields
    return section


def _record(init: str) -> tuple[Path, ModelRecord]:
    try:
        folder = model_folder(init)
        return folder, read_record(folder)
    except SFDError as error:
        raise SFDError(f"train.init: {error}") from None
