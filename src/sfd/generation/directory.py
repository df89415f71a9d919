"""A model directory: all that sampling, encoding new images and fine-tuning need; nothing has to be said again.

model.json            architecture, streams with statistics and tokenizer identities, schedule, classes, sampling
model.safetensors     the transformer's (averaged) weights
texture/              the encoder whose decoder turns the texture stream into pixels
semantic/             the encoder of the semantic stream, to encode new images; a large published one by name only
compressor/           of its features to the semantic stream
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfd.generation.config import SamplingConfig
from sfd.models.dit_config import DiTConfig
from sfd.utils import files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError
from sfd.utils.hub import HUB_NAME, fetch
from sfd.utils.shipped import find_model

RECORD, WEIGHTS = "model.json", "model.safetensors"
TEXTURE_FOLDER, SEMANTIC_FOLDER, COMPRESSOR_FOLDER = "texture", "semantic", "compressor"
FORMAT = 1


class ModelRecord(Settings):
    """The contents of `model.json`."""

    format: int
    identity: str
    sha256: str  # of the file of weights
    transformer: DiTConfig
    schedule: dict[str, Any]
    classes: tuple[str, ...]
    history: dict[str, Any]
    sample: SamplingConfig = SamplingConfig()


def read_record(folder: Path) -> ModelRecord:
    """Read and check `model.json`."""
    values = files.read_json(folder / RECORD, "model directory")
    if values.get("format") != FORMAT:
        raise SFDError(
            f"{folder / RECORD} is of format {values.get('format')!r}, this program reads format {FORMAT}; "
            "use the version of sfd that wrote the model"
        )
    return parse(ModelRecord, values, str(folder / RECORD))


def model_folder(path: str | Path) -> Path:
    """Find the model in a folder that is one, in a run's folder, or among the shipped ones by its name."""
    path = find_model(path)
    if (path / RECORD).exists():
        return path
    if (path / "recipe.yaml").exists() and not (path / "model" / RECORD).exists():
        raise SFDError(f"{path} is a run whose transformer is not trained yet; finish it with `sfd run` or `sfd train`")
    return path / "model" if (path / "model").is_dir() else path


def model_config(path: str | Path) -> DiTConfig:
    """Read the architecture of a model directory, or of a run's model, without its weights."""
    return read_record(model_folder(path)).transformer


def fetch_model(name: str | Path) -> Path:
    """Find a model as `model_folder` does; what is not on this machine is fetched from the Hugging Face hub."""
    try:
        return model_folder(name)
    except SFDError as absent:
        if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
            raise
        try:
            return model_folder(fetch(str(name)))
        except SFDError as error:
            raise SFDError(f"{absent}; {error}") from None
