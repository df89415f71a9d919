"""A model directory: all that sampling needs, and nothing that the user would have to say again.

model.json            architecture, streams with statistics and tokenizer identities, schedule, classes, history
model.safetensors     the transformer's (averaged) weights
texture/              the encoder whose decoder turns the texture stream into pixels
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from sfd.encoders import TextureEncoder, load_texture_encoder
from sfd.latents import CompositeLatent
from sfd.models.component import Component, assemble, fingerprint, read_weights
from sfd.models.dit import DiTConfig, LightningDiT
from sfd.models.inference import Inference, Precision
from sfd.schedules import Schedule, build_schedule
from sfd.utils import files
from sfd.utils.config import Settings, parse
from sfd.utils.errors import SFDError, unknown
from sfd.utils.shipped import find_model

RECORD, WEIGHTS, TEXTURE_FOLDER = "model.json", "model.safetensors", "texture"
TEXTURE_STREAM = "texture"
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


@dataclass
class Model:
    """A trained generator."""

    transformer: LightningDiT
    schedule: Schedule
    texture: TextureEncoder
    classes: tuple[str, ...]
    history: dict[str, Any] = field(default_factory=dict)
    """What it was trained on and for how long; for people, never read back."""
    stamp: str = ""  # the identity, once the weights are final
    _inference: dict[tuple[Precision, bool], Inference] = field(default_factory=dict, init=False, repr=False)

    @property
    def composite(self) -> CompositeLatent:
        """The streams that it generates."""
        return self.transformer.config.composite

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits: of a loaded model what was saved with it, else computed."""
        about = [self.transformer.config.model_dump(mode="json"), dict(sorted(self.schedule.spec.items()))]
        return self.stamp or fingerprint(about, self.transformer)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.position.device

    def to(self, device: torch.device) -> Model:
        """Move all networks to a device."""
        self.transformer.to(device)
        self.texture.to(device)
        self._inference.clear()
        return self

    def inference(self, precision: Precision = "float32", compiled: bool = False) -> Inference:
        """Prepare the transformer for sampling; once, whatever is done with its weights afterwards."""
        key = (precision, compiled)
        if key not in self._inference:
            self._inference[key] = Inference(self.transformer, precision, compiled=compiled)
        return self._inference[key]

    def class_indices(self, names: list[str]) -> list[int]:
        """Look classes up by name or by number.

        Raises:
            SFDError: there is no such class, or the model is unconditional.
        """
        if not self.classes:
            raise SFDError("this model is unconditional: it has no classes; leave --classes away")
        indices = []
        for name in names:
            if name in self.classes:
                indices.append(self.classes.index(name))
            elif name.isdecimal() and int(name) < len(self.classes):
                indices.append(int(name))
            else:
                raise unknown("class", name, self.classes)
        return indices

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the directory, whole or not at all; weights as `dtype` (float16 halves the size for publication)."""
        check_tokenizer(self.composite, self.texture, str(folder))
        with files.atomic_write(folder) as partial:
            partial.mkdir()
            weights = {name: t.to(dtype) for name, t in self.transformer.state_dict().items()}
            files.write_tensors(partial / WEIGHTS, weights)
            cast(Component, self.texture).save(partial / TEXTURE_FOLDER, dtype)
            record = {
                "format": FORMAT,
                "identity": self.identity,
                "sha256": files.checksum(partial / WEIGHTS),
                "transformer": self.transformer.config.model_dump(mode="json"),
                "schedule": self.schedule.spec,
                "classes": list(self.classes),
                "history": self.history,
            }
            files.write_json(partial / RECORD, record)


def model_folder(path: Path) -> Path:
    """Find the model in a folder that is one, in a run's folder, or among the shipped ones by its name.

    Raises:
        SFDError: the run has not trained its transformer yet.
    """
    path = find_model(path)
    if (path / RECORD).exists():
        return path
    if (path / "recipe.yaml").exists() and not (path / "model" / RECORD).exists():
        raise SFDError(f"{path} is a run whose transformer is not trained yet; finish it with `sfd run` or `sfd train`")
    return path / "model" if (path / "model").is_dir() else path


def model_config(path: Path) -> DiTConfig:
    """Read the architecture of a model directory, or of a run's model, without its weights.

    Raises:
        SFDError: there is no model, or its record is damaged.
    """
    folder = model_folder(path)
    record = parse(ModelRecord, files.read_json(folder / RECORD, "model directory"), str(folder / RECORD))
    return record.transformer


def load_model(folder: Path, device: torch.device) -> Model:
    """Load a model directory, in evaluation mode, as float32.

    Raises:
        SFDError: something is missing or damaged, the format is unknown, weights and configuration do not fit, or the
            texture encoder is another one than the latents were made with.
    """
    values = files.read_json(folder / RECORD, "model directory")
    if values.get("format") != FORMAT:
        raise SFDError(
            f"{folder / RECORD} is of format {values.get('format')!r}, this program reads format {FORMAT}; "
            "use the version of sfd that wrote the model"
        )
    record = parse(ModelRecord, values, str(folder / RECORD))
    tensors = read_weights(folder / WEIGHTS, record.sha256)
    transformer = assemble(lambda: LightningDiT(record.transformer), tensors, str(folder / WEIGHTS))
    schedule = build_schedule(record.schedule, record.transformer.composite.names)
    texture = load_texture_encoder(folder / TEXTURE_FOLDER)
    check_tokenizer(record.transformer.composite, texture, str(folder))
    model = Model(transformer, schedule, texture, record.classes, record.history, record.identity)
    return model.to(device)


def check_tokenizer(composite: CompositeLatent, texture: TextureEncoder, where: str) -> None:
    """Refuse to decode latents with another encoder than the one that made them: the result would be noise.

    Raises:
        SFDError: names both.
    """
    expected = composite[TEXTURE_STREAM].tokenizer
    if expected and expected != texture.identity:
        raise SFDError(
            f"{where}: the texture latents were made by tokenizer {expected}, but the texture encoder here is "
            f"{texture.identity}; use the encoder that the latents were prepared with"
        )
