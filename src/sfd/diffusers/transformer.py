"""The velocity network as a diffusers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.utils.config import parse
from sfd.utils.device import to_device


@dataclass
class VelocityOutput(BaseOutput):
    """What the transformer gives."""

    sample: Tensor  # (B, N) velocity, float32
    guiding: Tensor | None = None  # (B, N) that of the second head, if it is wanted


class SFDTransformer(ModelMixin, ConfigMixin):
    """v̂(x, t, y) on packed composite latents.

    In float16 or bfloat16 only the weights of the blocks' matrix products are rounded: the residual stream, norms and
    times stay float32, as in `sfd sample precision=bf16`.
    """

    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _keep_in_fp32_modules = [
        "embeddings",
        "embedding_bias",
        "time_embedders",
        "end_embedders",
        "class_embedding",
        "attention_norm",
        "mlp_norm",
        "qk_weight",
        "final_norm",
        "final_modulation",
        "heads",
        "guide_norm",
        "guide_modulation",
        "guide_heads",
        "projector",
    ]
    _skip_layerwise_casting_patterns = ["norm", "modulation"]

    @register_to_config
    def __init__(self, architecture: dict[str, Any]) -> None:
        """Build with fresh weights; `architecture` has the fields of `sfd.DiTConfig` as plain values."""
        super().__init__()
        self.dit = LightningDiT(parse(DiTConfig, architecture, "architecture"))

    @property
    def composite(self) -> CompositeLatent:
        """The streams, with their statistics."""
        return self.dit.config.composite

    @property
    def null_class(self) -> int:
        """Label of the null class."""
        return self.dit.null_class

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        second_head: bool = False,
        ends: Tensor | None = None,
        return_dict: bool = True,
    ) -> VelocityOutput | tuple[Tensor, ...]:
        """Predict the velocity.

        Args:
            hidden_states: (B, N) packed, normalised latents.
            timestep: (K,) or (B, K), each stream's own time: 0 is noise, 1 is data.
            class_labels: (B,) int64; the number of classes is the null class.
            second_head: also give the second head's velocity.
            ends: (K,) or (B, K), of a distilled model: each stream's time at the end of the step.
            return_dict: give a record; False: a tuple.
        """
        x = hidden_states.float()
        times, end = (
            None if t is None else to_device(t.to(x.dtype), x.device).expand(len(x), -1) for t in (timestep, ends)
        )
        given = self.dit(x, times, class_labels.to(x.device), ends=end, second_head=second_head)
        output = VelocityOutput(sample=given.velocity, guiding=given.guiding)
        return output if return_dict else output.to_tuple()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SFDTransformer:
        """Keep float32 what must stay so when the model is cast as a whole; `from_pretrained` does it by itself."""
        super()._apply(fn, recurse)
        kept = set(self._keep_in_fp32_modules)
        named = [(name, p) for name, p in self.named_parameters() if kept & set(name.split("."))]
        for _, tensor in [*named, *self.named_buffers()]:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        return self
