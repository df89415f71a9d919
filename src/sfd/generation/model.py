"""A trained generator: its networks, schedule and classes, and how images are sampled from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfd.data.classes import find_class
from sfd.data.images import to_pixels
from sfd.encoders import SemanticEncoder, TextureEncoder
from sfd.flow_map import coarsen, take_steps
from sfd.generation.card import model_card
from sfd.generation.config import SamplingConfig
from sfd.generation.directory import FORMAT, RECORD, WEIGHTS, fetch_model, read_record
from sfd.generation.tokenizers import Tokenizers, load_tokenizers
from sfd.guidance import VelocityField, guide
from sfd.latents import TEXTURE, CompositeLatent
from sfd.models.component import assemble, fingerprint, read_weights
from sfd.models.compressor import Compressor
from sfd.models.dit import LightningDiT
from sfd.models.inference import Inference, Precision, require_compiler
from sfd.sampling import Progress, Result, initial_noise, integrate
from sfd.schedule import Schedule, build_schedule
from sfd.utils import files
from sfd.utils.config import first_difference, parse
from sfd.utils.device import choose_device, full_float32
from sfd.utils.errors import SFDError, unknown
from sfd.utils.hub import HubFolder

DECODED_AT_ONCE = 32  # images: pixels take far more memory than latents
NO_SOURCE = {
    "guiding_model": "guidance_from is guiding_model, but no guiding model was given; name one (--guiding-model)",
    "inside": "guidance_from is inside, but this network has no second head; train one with transformer.guide_block",
}

Classes = str | int | Sequence[str | int]
Output = Literal["pil", "array", "tensor", "latent"]


class SampleBatch(NamedTuple):
    """One batch of images."""

    first: int  # number of the batch's first image
    images: np.ndarray  # uint8 (B, S, S, 3)
    latents: Tensor  # (B, N) packed, normalised, on the CPU
    nfe: int  # number of function evaluations; a guided one counts once


@dataclass(repr=False)
class Model(HubFolder):
    """A trained generator; `load` reads one from a model directory."""

    transformer: LightningDiT
    schedule: Schedule
    texture: TextureEncoder
    classes: tuple[str, ...]  # names; empty: unconditional
    history: dict[str, Any] = field(default_factory=dict)  # what it was trained on; for people, never read back
    saved_identity: str = ""  # the identity, once the weights are final
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # defaults, those of its recipe
    semantic: SemanticEncoder | None = None  # with the compressor it makes the semantic stream; None: not kept
    compressor: Compressor | None = None
    _inference: dict[tuple[Precision, bool], Inference] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        streams = ", ".join(f"{s.name} {s.channels}×{s.grid}×{s.grid}" for s in self.composite.streams)
        return f"<sfd model: {streams}; {len(self.classes)} classes; {self.schedule.spec}; {self.sampling.summary()}>"

    @property
    def composite(self) -> CompositeLatent:
        """The streams that it generates."""
        return self.transformer.config.composite

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits: of a loaded model what was saved with it, else computed."""
        about = [self.transformer.config.model_dump(mode="json"), dict(sorted(self.schedule.spec.items()))]
        return self.saved_identity or fingerprint(about, self.transformer)

    @property
    def labels(self) -> list[int]:
        """All class indices; of an unconditional model the null class."""
        return list(range(len(self.classes))) or [self.transformer.null_class]

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.transformer.parameters()).device

    def to(self, device: str | torch.device) -> Model:
        """Move all networks to a device."""
        self.transformer.to(device)
        self.texture.to(device)
        self._inference.clear()
        return self

    def sample(
        self,
        classes: Classes | None = None,
        seeds: int | Sequence[int] | None = None,
        *,
        guiding: Model | None = None,
        output: Output = "pil",
        callback: Callable[[Progress], None] | None = None,
        **settings: Any,
    ) -> Any:
        """Sample image i of class classes[i] from seeds[i] alone.

        Args:
            classes: names or numbers, one per image, or one for all; None: all classes in turn.
            seeds: whole numbers ≥ 0, one per image, or one for all; None: 0, 1, 2, …
            guiding: a less trained model, for AutoGuidance; sets guidance_from to guiding_model.
            output: "pil": a list of PIL images; "array": uint8 (B, S, S, 3); "tensor": float32 (B, 3, S, S) in [0, 1];
                "latent": packed, normalised latents (B, N), which `composite.unpack` splits.
            callback: called after each solver step, batch by batch.
            settings: fields of `SamplingConfig` that differ from the model's own, such as steps and guidance.
        """
        labels, chosen = self._labels_and_seeds(classes, seeds)
        config = self._config_of(guiding, settings)
        batches = list(self.sample_batches(labels, chosen, config, guiding=guiding, callback=callback))
        if output == "latent":
            return torch.cat([batch.latents for batch in batches])
        images = np.concatenate([batch.images for batch in batches])
        if output == "pil":
            return [Image.fromarray(image) for image in images]
        if output == "tensor":
            return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        if output != "array":
            raise unknown("output", output, ("pil", "array", "tensor", "latent"))
        return images

    def trajectory(
        self,
        classes: Classes | None = None,
        seeds: int | Sequence[int] | None = None,
        *,
        guiding: Model | None = None,
        **settings: Any,
    ) -> list[Progress]:
        """All states of a sampling, from noise to data; see `sample`. `decode` shows a state's texture as images."""
        labels, chosen = self._labels_and_seeds(classes, seeds)
        start = initial_noise(chosen, self.composite).to(self.device)
        states = [Progress(0.0, torch.zeros(len(self.composite.streams)), start, 0)]
        config = self._config_of(guiding, settings | {"batch_size": len(chosen)})
        list(self.sample_batches(labels, chosen, config, guiding=guiding, callback=states.append))
        return states

    def velocity(
        self, x: Tensor, t: Tensor | Sequence[float] | Mapping[str, float], classes: Classes | None = None
    ) -> Tensor:
        """Predict the velocity, without guidance.

        Args:
            x: (B, N) packed, normalised latents at the times t, on any device.
            t: (K,) time of each stream in [0, 1], in the order of `composite.names` or by name.
            classes: names or numbers, one per image or one for all; None: the null class.

        Returns:
            (B, N) float32, on the model's device.
        """
        if isinstance(t, Mapping):
            t = [t[name] for name in self.composite.names]
        labels = self.labels_of(classes, len(x))
        network = self.inference().velocity(torch.tensor(labels, device=self.device))
        return network(x.to(self.device), torch.as_tensor(t))

    def config(self, **settings: Any) -> SamplingConfig:
        """The model's sampling defaults with some fields changed."""
        return parse(SamplingConfig, {**self.sampling.model_dump(mode="json"), **settings}, "sampling")

    def _config_of(self, guiding: Model | None, settings: dict[str, Any]) -> SamplingConfig:
        return self.config(**({"guidance_from": "guiding_model"} if guiding else {}) | settings)

    def sample_batches(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        config: SamplingConfig,
        *,
        guiding: Model | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Iterator[SampleBatch]:
        """Sample image i with labels[i] from seeds[i], `config.batch_size` at a time.

        Args:
            labels: class indices; the null class is the number of classes.
            seeds: one per image, ≥ 0.
            config: solver, steps, guidance.
            guiding: see `sample`.
            callback: see `sample`.
        """
        self.check_sampling(config, guiding)
        if len(labels) != len(seeds):
            raise SFDError(f"{len(labels)} labels were given for {len(seeds)} seeds; give one label per seed")
        for first in range(0, len(seeds), config.batch_size):
            batch = slice(first, first + config.batch_size)
            noise = initial_noise(seeds[batch], self.composite).to(self.device)
            on_device = torch.tensor(labels[batch], device=self.device)
            result = self.sample_latents(noise, on_device, config, guiding, seeds[batch], callback)
            yield SampleBatch(first, self.decode(result.x, config.precision), result.x.cpu(), result.nfe)

    def sample_latents(
        self,
        noise: Tensor,
        labels: Tensor,
        config: SamplingConfig,
        guiding: Model | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> Result:
        """Carry noise (B, N) to latents of labels (B,), both on the model's device; see `sample_batches`."""
        if grid := self.transformer.config.flow_map:
            mean = self.inference(config.precision, config.compile).mean_velocity(labels)
            return take_steps(mean, noise, self.schedule, self.composite, coarsen(grid, config.steps), callback)
        velocity = self.velocity_field(labels, config, guiding)
        how: dict[str, Any] = {**config.integration, "seeds": seeds, "callback": callback}
        return integrate(velocity, noise, self.schedule, self.composite, **how)

    def check_sampling(self, config: SamplingConfig, guiding: Model | None = None) -> None:
        """Refuse settings or a guiding model that do not fit, before anything is computed."""
        if self.transformer.config.flow_map:
            config.check_flow_map(self.transformer.config.flow_map)
            if config.compile:
                require_compiler(self.device)
            return
        has_guiding = self._has_guiding(config, guiding)
        if guiding is not None:
            if config.guidance_from != "guiding_model":
                raise SFDError(
                    f"a guiding model was given, but guidance_from is {config.guidance_from}; set it to guiding_model, "
                    "or leave the model out"
                )
            _check_guiding(self, guiding)
        elif config.guides and not has_guiding and config.guidance_from in NO_SOURCE:
            raise SFDError(f"{NO_SOURCE[config.guidance_from]}, or set guidance_from=null_class")
        config.check(self.schedule, self.composite, has_guiding=has_guiding)
        if config.compile:
            require_compiler(self.device)

    def velocity_field(self, labels: Tensor, config: SamplingConfig, guiding: Model | None = None) -> VelocityField:
        """The guided velocity of labels (B,)."""
        network = self.inference(config.precision, config.compile)
        v_w, pair = None, None
        if guiding is not None:
            v_w = guiding.inference(config.precision, config.compile).velocity(labels)
        elif self._has_guiding(config) and config.guidance_from == "inside":
            pair = network.inside(labels)
        elif self._has_guiding(config):
            pair = network.pair(labels, torch.full_like(labels, self.transformer.null_class))
        return guide(network.velocity(labels), v_w, config.guidance, self.composite, config.interval, batched=pair)

    def _has_guiding(self, config: SamplingConfig, guiding: Model | None = None) -> bool:
        """Whether there is what `config.guidance_from` names, to guide with."""
        second_head = self.transformer.config.guide_block is not None
        sources = {"null_class": bool(self.classes), "guiding_model": guiding is not None, "inside": second_head}
        return sources[config.guidance_from]

    @torch.no_grad()
    @full_float32()
    def decode(self, packed: Tensor, precision: Precision = "float32") -> np.ndarray:
        """Decode the texture stream of packed, normalised latents (B, N) to uint8 images (B, S, S, 3)."""
        latents = self.composite.denormalize(self.composite.unpack(packed))[TEXTURE].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, precision == "bf16"):
            pixels = [to_pixels(self.texture.decode(z).float()) for z in latents.split(DECODED_AT_ONCE)]
        return torch.cat(pixels).cpu().numpy()

    def encode(self, images: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Encode images as in training: uint8 (B, S, S, 3), or RGB images of S×S pixels.

        Returns:
            (B, N) packed, normalised latents on the model's device; `decode` reverses the texture stream.
        """
        return self._tokenizers.encode(images, self.composite, self.device)

    @property
    def _tokenizers(self) -> Tokenizers:
        return Tokenizers(self.texture, self.semantic, self.compressor)

    def inference(self, precision: Precision = "float32", compiled: bool = False) -> Inference:
        """Prepare the transformer for sampling; once, whatever is done with its weights afterwards."""
        key = (precision, compiled)
        if key not in self._inference:
            self._inference[key] = Inference(self.transformer, precision, compiled=compiled)
        return self._inference[key]

    def class_indices(self, classes: Classes) -> list[int]:
        """Look classes up by name or by number."""
        if not self.classes:
            raise SFDError("this model is unconditional: it has no classes; leave them out")
        return [find_class(given, self.classes) for given in ([classes] if isinstance(classes, str | int) else classes)]

    def labels_of(self, classes: Classes | None, count: int) -> list[int]:
        """Labels of `count` given latents: names or numbers, one each or one for all; None: the null class."""
        labels = [self.transformer.null_class] if classes is None else self.class_indices(classes)
        labels = labels * count if len(labels) == 1 else labels
        if len(labels) != count:
            raise SFDError(f"{len(labels)} classes were given for {count} latents; give one per latent, or one for all")
        return labels

    def _labels_and_seeds(
        self, classes: Classes | None, seeds: int | Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        """Labels and seeds, one of each per image."""
        labels = self.labels if classes is None else self.class_indices(classes)
        if seeds is None:
            return labels, list(range(len(labels)))
        chosen = [seeds] if isinstance(seeds, int) else list(seeds)
        if classes is None:
            labels = [labels[i % len(labels)] for i in range(len(chosen))]
        count = max(len(labels), len(chosen))
        labels, chosen = (each * count if len(each) == 1 else each for each in (labels, chosen))
        if len(labels) != len(chosen):
            raise SFDError(
                f"{len(labels)} classes were given for {len(chosen)} seeds; give as many, or one of either for all"
            )
        return labels, chosen

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model directory atomically; weights as `dtype` (float16 halves the size)."""
        self._tokenizers.check(self.composite, str(folder))
        with files.atomic_write(Path(folder)) as partial:
            partial.mkdir()
            weights = {name: t.to(dtype) for name, t in self.transformer.state_dict().items()}
            files.write_tensors(partial / WEIGHTS, weights)
            self._tokenizers.save(partial, dtype)
            record = {
                "format": FORMAT,
                "identity": self.identity,
                "sha256": files.checksum(partial / WEIGHTS),
                "transformer": self.transformer.config.model_dump(mode="json"),
                "schedule": self.schedule.spec,
                "classes": list(self.classes),
                "history": self.history,
                "sample": self.sampling.model_dump(mode="json"),
            }
            files.write_json(partial / RECORD, record)

    @classmethod
    def from_folder(cls, folder: Path, device: str | torch.device = "auto") -> Model:
        """Load a model directory or a run's folder; see `load`."""
        return load(folder, device)

    def card(self, **known: Any) -> str:
        """Write the text of the model card; see `sfd.generation.card.model_card`."""
        return model_card(self, **known)


def load(name: str | Path, device: str | torch.device = "auto") -> Model:
    """Load a model.

    Args:
        name: a model directory, a run's folder, the name of a shipped model ("shapes"), or a name on the Hugging Face
            hub ("owner/name").
        device: name or torch device; "auto": a GPU if there is one.
    """
    return load_model(fetch_model(name), choose_device(str(device)))


def load_model(folder: Path, device: torch.device) -> Model:
    """Load a model directory, in evaluation mode, as float32."""
    record = read_record(folder)
    tensors = read_weights(folder / WEIGHTS, record.sha256)
    transformer = assemble(lambda: LightningDiT(record.transformer), tensors, str(folder / WEIGHTS))
    schedule = build_schedule(record.schedule, record.transformer.composite.names)
    texture, semantic, compressor = tokenizers = load_tokenizers(folder)
    tokenizers.check(record.transformer.composite, str(folder))
    about = record.classes, record.history, record.identity, record.sample
    return Model(transformer, schedule, texture, *about, semantic, compressor).to(device)


def _check_guiding(model: Model, guiding: Model) -> None:
    """Refuse a guiding model of other data or other latents."""

    def facts(each: Model) -> dict[str, Any]:
        streams = {s.name: {"shape": s.shape} | s.model_dump(include={"tokenizer", "mean", "std"})
                   for s in each.composite.streams}  # fmt: skip
        return {"classes": each.classes, "names of streams": each.composite.names, **streams}

    different = first_difference(facts(model), facts(guiding))
    if different is not None:
        name, ours, theirs = different
        raise SFDError(f"{name}: {ours} of the model, {theirs} of the guiding model; take one of the same latents")
