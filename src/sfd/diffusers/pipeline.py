"""The pipeline: class labels to images, with diffusers' usual arguments, and the images of `sfd sample`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from sfd.data.classes import find_class
from sfd.diffusers.autoencoder import SFDAutoencoder
from sfd.diffusers.scheduler import SFDScheduler
from sfd.diffusers.transformer import SFDTransformer
from sfd.generation.config import FLOW_MAP, SamplingConfig
from sfd.guidance import GuidedVelocity, VelocityField, guide
from sfd.latents import TEXTURE
from sfd.sampling import initial_noise
from sfd.utils.config import parse
from sfd.utils.device import full_float32
from sfd.utils.errors import SFDError, unknown

OUTPUTS = ("pil", "np", "pt", "latent")
SHIMS = {"SFDTransformer": "transformer", "SFDScheduler": "scheduler", "SFDAutoencoder": "autoencoder"}
"""Modules of `sfd.diffusers` by the class that `model_index.json` names; beside a component lies `sfd_MODULE.py`."""

# Imported by name: diffusers would advise `pip install sfd`, which may be another package.
SHIM = '''"""Lets diffusers find {name} in the package sfd, without which this model cannot be loaded."""

import importlib

try:
    {name} = importlib.import_module("sfd.diffusers").{name}
except ModuleNotFoundError as error:
    if error.name != "sfd":
        raise
    raise ImportError(
        "this model needs the package sfd, semantic-first diffusion (arXiv 2512.04926), which is not installed; "
        "get its source code and run `pip install .` there"
    ) from None
'''

Generators = torch.Generator | Sequence[torch.Generator]


class SFDPipeline(DiffusionPipeline):
    """Generates images of given classes."""

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SFDTransformer,
        scheduler: SFDScheduler,
        vae: AutoencoderKL | SFDAutoencoder,
        id2label: dict[str, str] | None = None,
        sampling: dict[str, Any] | None = None,
        history: dict[str, Any] | None = None,
        identity: str = "",
    ) -> None:
        """Join the components.

        Args:
            transformer, scheduler: of the same streams.
            vae: decodes the texture stream.
            id2label: names of the classes by number; None: unconditional, or known by number alone.
            sampling: fields of `SamplingConfig` that differ from its defaults.
            history, identity: of the model that it was made from; see `to_model`.
        """
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label or {}, sampling=sampling or {}, history=history or {}, identity=identity
        )
        self.image_processor = VaeImageProcessor()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        names = self.config["id2label"]
        return tuple(names[key] for key in sorted(names, key=int))

    @property
    def guidance_scale(self) -> float | dict[str, float]:
        """Scale of the present call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[Any] | Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | dict[str, float] | None = None,
        guidance_interval: tuple[float, float] | dict[str, tuple[float, float]] | None = None,
        guidance_from: str | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            class_labels: names or numbers, one per image or one for all; None: the null class.
            num_inference_steps: None: the model's default, as for the next three. A distilled model has no guidance.
            guidance_scale: for all streams, or by stream; 1: none.
            guidance_interval: stream times within which to guide, for all streams or by stream.
            guidance_from: null_class, or inside: the network's second head.
            num_images_per_prompt: images for each label.
            generator: a fresh generator with seed k gives the image of `Model.sample(label, seeds=k)`. A list has one
                per image; of a single one the first image has the seed and the others have seeds drawn from it.
            latents: (B, N) packed standard normal noise in place of a generator's.
            output_type: "pil"; "np": float32 (B, S, S, 3) in [0, 1]; "pt": (B, 3, S, S); "latent": packed, normalised
                latents (B, N), which `transformer.composite.unpack` splits.
            return_dict: give a record with `images`; False: a tuple.
            callback_on_step_end: called as f(pipeline, step, base time, tensors) after each step; returns the tensors.
            callback_on_step_end_tensor_inputs: names of its tensors: "latents".
        """
        if output_type not in OUTPUTS:
            raise unknown("output_type", output_type, OUTPUTS)
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise unknown("tensor input of a callback", name, self._callback_tensor_inputs)
        settings = self._settings(
            steps=num_inference_steps, guidance=guidance_scale, interval=guidance_interval, guidance_from=guidance_from
        )
        chosen = self._labels(class_labels, num_images_per_prompt, generator, latents)
        device = self._execution_device
        labels = torch.tensor(chosen, device=device)
        x = self.prepare_latents(len(chosen), generator, latents).to(device)
        self._guidance_scale = settings.guidance
        velocity = self._velocity(labels, settings)
        jumps = velocity.discontinuities if isinstance(velocity, GuidedVelocity) else ()
        self.scheduler.set_timesteps(settings.steps, device, jumps=jumps)
        self._num_timesteps = sum(evaluation.last for evaluation in self.scheduler.evaluations)

        def after_step(step: int, u: Tensor, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
            return callback_on_step_end(self, step, u, tensors).get("latents", x)

        x = self._denoise(x, labels, settings, after_step)
        images = x if output_type == "latent" else self.decode_latents(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self, x: Tensor, labels: Tensor, settings: SamplingConfig, after_step: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Carry noise to data, evaluation by evaluation; `after_step` may replace the latents."""
        step = 0
        with self.progress_bar(total=self._num_timesteps) as bar:
            for u in self.scheduler.timesteps:
                evaluation = self.scheduler.evaluation
                velocity = self._velocity(labels, settings)  # a callback may have changed the scale
                if isinstance(velocity, GuidedVelocity) and evaluation.interval.midpoint is not None:
                    velocity = velocity.on_interval(evaluation.interval.active, evaluation.interval.midpoint)
                v = velocity(x, self.scheduler.stream_times().time.to(x.dtype))
                x = self.scheduler.step(v, u, x).prev_sample
                if evaluation.last:
                    x = after_step(step, u, x)
                    step += 1
                    bar.update()
        return x

    def prepare_latents(self, count: int, generator: Generators | None = None, latents: Tensor | None = None) -> Tensor:
        """Draw noise (count, N), float32; see `__call__` for how generators give it."""
        composite = self.transformer.composite
        if latents is None:
            return initial_noise(image_seeds(generator, count), composite)
        if latents.shape != (count, composite.size):
            raise SFDError(f"latents for {count} images must be {(count, composite.size)}, got {tuple(latents.shape)}")
        return latents.float()

    @torch.no_grad()
    @full_float32()
    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Decode the texture stream of packed, normalised latents (B, N), at any step; see `__call__`."""
        composite = self.transformer.composite
        texture = composite.denormalize(composite.unpack(latents))[TEXTURE]
        images = self.vae.decode(texture.to(self.vae.dtype)).sample.float()
        return self.image_processor.postprocess(images, output_type=output_type)

    def _settings(self, **given: Any) -> SamplingConfig:
        """What is given, else the model's own; the scheduler decides about the solver and the time shift."""
        values = {name: self.config["sampling"].get(name) if value is None else value for name, value in given.items()}
        settings = parse(SamplingConfig, {n: v for n, v in values.items() if v is not None}, "pipeline")
        config, source = self.transformer.dit.config, settings.guidance_from
        if config.flow_map:
            settings.model_copy(update={"solver": FLOW_MAP}).check_flow_map(config.flow_map)
        sources = {"null_class": config.num_classes > 0, "inside": config.guide_block is not None}
        if settings.guides and not sources.get(source):
            able = " or ".join(name for name, there in sources.items() if there) or "nothing; set guidance_scale to 1"
            raise SFDError(f"this pipeline cannot be guided by guidance_from = {source!r}; it can by {able}")
        return settings

    def _labels(self, given: Any, per_label: int, generator: Generators | None, latents: Tensor | None) -> list[int]:
        """Class indices, one per image."""
        lists = [each for each in (latents, generator) if isinstance(each, Sequence | Tensor)]
        count = len(lists[0]) if lists else None
        labels = [self.transformer.null_class] if given is None else [self._label(each) for each in _flat(given)]
        labels = [label for label in labels for _ in range(per_label)]
        if count is not None and len(labels) == 1:
            labels *= count
        if any(len(each) != len(labels) for each in lists):
            raise SFDError(
                f"{len(labels)} images are wanted, but {count} generators or latents were given; give one per image"
            )
        return labels

    def _label(self, given: str | int) -> int:
        if isinstance(given, int) and 0 <= given <= self.transformer.null_class:
            return given
        classes = self.classes or tuple(map(str, range(self.transformer.null_class)))
        return find_class(given, classes)

    def _velocity(self, labels: Tensor, settings: SamplingConfig) -> VelocityField:
        null = torch.full_like(labels, self.transformer.null_class)

        def cond(x: Tensor, t: Tensor) -> Tensor:
            ends = self.scheduler.end_times() if self.transformer.dit.config.flow_map else None
            return cast(Tensor, self.transformer(x, t, labels, ends=ends).sample)

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            if settings.guidance_from == "inside":
                output = self.transformer(x, t, labels, second_head=True)
                return output.sample, output.guiding
            v_c, v_w = self.transformer(x.repeat(2, 1), t, torch.cat([labels, null])).sample.chunk(2)
            return v_c, v_w

        return guide(cond, None, self._guidance_scale, self.transformer.composite, settings.interval, batched=pair)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read `model_index.json`; the project's classes are the installed ones, so no file of the folder is run."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and value[1] in SHIMS:
                module = f"sfd.diffusers.{SHIMS[value[1]]}"
                importlib.import_module(module)
                config[name] = [module, value[1]]
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a pipeline from the hub, all but its Python files, or find it in the local cache."""
        from huggingface_hub import snapshot_download

        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, ignore_patterns=["*.py"], **options)

    def to_json_string(self) -> str:
        """Format `model_index.json`, which names the files beside the components."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = ["pipeline", SFDPipeline.__name__]
        for name, value in config.items():
            if isinstance(value, list) and value[1] in SHIMS:
                config[name] = [f"sfd_{SHIMS[value[1]]}", value[1]]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and the Python files by which `DiffusionPipeline.from_pretrained` finds `sfd`."""
        folder = Path(save_directory)
        shims = {folder / "pipeline.py": SFDPipeline.__name__}
        for name, component in self.components.items():
            class_name = type(component).__name__
            if class_name in SHIMS:
                shims[folder / name / f"sfd_{SHIMS[class_name]}.py"] = class_name
        for path, class_name in shims.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SHIM.format(name=class_name), encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)


def image_seeds(generator: Generators | None, count: int) -> list[int]:
    """Seeds of `count` images; every call leaves the generators advanced, so that the next images differ."""
    if generator is None:
        return torch.randint(2**63 - 1, (count,)).tolist()
    if isinstance(generator, torch.Generator):
        return [_next_seed(generator) for _ in range(count)]
    return [_next_seed(each) for each in generator]


def _next_seed(generator: torch.Generator) -> int:
    """The generator's own seed if nothing has been drawn from it, else a number drawn from it."""
    unused = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    fresh = torch.equal(unused.get_state(), generator.get_state())
    drawn = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    return generator.initial_seed() if fresh else drawn


def _flat(given: Any) -> list[str | int]:
    """A label, or lists of labels in lists, as one list."""
    if isinstance(given, Tensor):
        given = given.tolist()
    return [given] if isinstance(given, str | int) else [label for each in given for label in _flat(each)]
