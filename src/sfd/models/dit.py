"""The velocity network: LightningDiT (Yao et al. 2025) over any composite latent, with a time input per stream.

It receives times and labels, and knows nothing of schedules and guidance. Under bf16 autocast only matrix products and
the operations between them run in bf16: the residual stream, the norms and the velocity stay float32, because long bf16
runs end in NaN when small updates are added to a bf16 residual.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sfd.models.dit_config import DiTConfig
from sfd.models.layers import Block, ModulatedNorm, TimeEmbedder, patchify, rope_table, sincos_pos_embed, unpatchify
from sfd.utils import rng
from sfd.utils.errors import SFDError

MIN_REMAINING = 0.05  # least 1 − t that a prediction of the data is divided by, where it becomes a velocity


class DiTOutput(NamedTuple):
    """The network's output for one batch."""

    velocity: Tensor  # (B, N) packed like the input, float32
    projection: Tensor | None  # (B, T, C) tokens after the REPA projector, if requested
    guiding: Tensor | None = None  # (B, N) velocity of the second head, float32, if requested


class LightningDiT(nn.Module):
    """v̂(x, t, y) on packed composite latents. Its weights stay float32; for bf16, call it under `torch.autocast`."""

    pos_embed: Tensor
    rope: Tensor

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        """Build with weights that are a function of `seed` alone."""
        super().__init__()
        self.config = config
        with rng.seeded(seed, "transformer"):
            self._build(config)
            self._initialise()

    def _build(self, config: DiTConfig) -> None:
        composite, width = config.composite, config.width
        # The streams' embeddings are summed, so biases of their own would be one and the same degree of freedom.
        self.embeddings = nn.ModuleList(nn.Linear(s.token_size, width, bias=False) for s in composite.streams)
        self.embedding_bias = nn.Parameter(torch.zeros(width))
        self.clock_streams = [composite.index(name) for name in config.clocks] or [0]
        clocks = len(self.clock_streams)
        self.time_embedders = nn.ModuleList(TimeEmbedder(width // clocks) for _ in range(clocks))
        self.end_embedders = nn.ModuleList(
            TimeEmbedder(width // clocks) for _ in range(clocks if config.flow_map else 0)
        )
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final_norm = ModulatedNorm(width)
        self.final_modulation = nn.Linear(width, 2 * width)
        # Output heads; the attention heads are config.heads.
        self.heads = nn.ModuleList(nn.Linear(width, s.token_size) for s in composite.streams)
        if config.guide_block is not None:
            self.guide_norm = ModulatedNorm(width)
            self.guide_modulation = nn.Linear(width, 2 * width)
            self.guide_heads = nn.ModuleList(nn.Linear(width, s.token_size) for s in composite.streams)
        features = config.repa_channels
        self.projector = None if features is None else _projector(width, config.repa_width, features)
        grid = composite.token_grid
        self.register_buffer("pos_embed", sincos_pos_embed(width, grid), persistent=False)
        self.register_buffer("rope", rope_table(width // config.heads, grid)[:, None, None], persistent=False)

    def _initialise(self) -> None:
        """Linears Xavier-uniform with zero bias; class and time embeddings N(0, 0.02²); modulations and output zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embeddings are column blocks of one matrix, so its total number of columns is their fan-in.
        columns = sum(s.token_size for s in self.config.composite.streams)
        bound = (6 / (columns + self.config.width)) ** 0.5
        for embedding in self.embeddings:
            nn.init.uniform_(embedding.get_parameter("weight"), -bound, bound)
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        for module in self.time_embedders.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        zeros = [self.final_modulation, *self.heads, *(block.modulation for block in self.blocks)]
        if self.config.guide_block is not None:
            zeros += [self.guide_modulation, *self.guide_heads]
        for zero in zeros:
            nn.init.zeros_(zero.get_parameter("weight"))
        for embedder in self.end_embedders:  # a student begins as its teacher, whatever the end of the step
            nn.init.zeros_(embedder.get_parameter("mlp.2.weight"))

    @property
    def null_class(self) -> int:
        """Label of the null class."""
        return self.config.num_classes

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        labels: Tensor,
        *,
        ends: Tensor | None = None,
        project: bool = False,
        second_head: bool = False,
    ) -> DiTOutput:
        """Predict the velocity.

        Args:
            x: (B, N), packed noisy latents.
            times: (B, K), each stream's own time, in the composite's order; all equal with one time embedding.
            labels: (B,), int64, in [0, num_classes]; num_classes is the null class.
            ends: (B, K), of a flow map: each stream's time at the end of the step; the velocity is the mean until then.
            project: also give the REPA projection.
            second_head: also give the second head's velocity.
        """
        self._check(x, times, ends, project, second_head)
        tokens = self.embed(x)
        condition = self.condition(times, labels, ends)
        projection, guiding = None, None
        for number, block in enumerate(self.blocks, start=1):
            if self.config.checkpointing and torch.is_grad_enabled():
                tokens = self._recomputed(block, tokens, condition)
            else:
                tokens = block(tokens, condition, self.rope)
            if project and self.projector is not None and number == self.config.repa_block:
                projection = self.projector(tokens)
            if second_head and number == self.config.guide_block:
                guiding = self._heads(tokens, condition, self.guide_norm, self.guide_modulation, self.guide_heads)
                guiding = self._as_velocity(guiding, x, times)
        output = self._heads(tokens, condition, self.final_norm, self.final_modulation, self.heads)
        return DiTOutput(self._as_velocity(output, x, times), projection, guiding)

    def _recomputed(self, block: nn.Module, tokens: Tensor, condition: Tensor) -> Tensor:
        """Apply a block, whose activations are computed again in the backward pass."""
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn
        if self.config.checkpointing == "selective":
            how["context_fn"] = _selective_context
        result: Tensor = checkpoint(block, tokens, condition, self.rope, **how)
        return result

    def embed(self, x: Tensor) -> Tensor:
        """(B, N) → tokens (B, T, width): the sum of the streams' patch embeddings and the position's."""
        latents = self.config.composite.unpack(x)
        tokens = self.pos_embed + self.embedding_bias
        for embedding, stream in zip(self.embeddings, self.config.composite.streams, strict=True):
            tokens = tokens + embedding(patchify(latents[stream.name], stream.patch_size))
        return tokens

    def condition(self, times: Tensor, labels: Tensor, ends: Tensor | None = None) -> Tensor:
        """SiLU of the sum of time and class embedding, (B, width), the input of every modulation."""
        clocks = [embedder(times[:, k]) for embedder, k in zip(self.time_embedders, self.clock_streams, strict=True)]
        embedded = torch.cat(clocks, dim=1) + self.class_embedding(labels)
        if ends is not None:
            pairs = zip(self.end_embedders, self.clock_streams, strict=True)
            embedded = embedded + torch.cat([embedder(ends[:, k]) for embedder, k in pairs], dim=1)
        return nn.functional.silu(embedded)

    def _as_velocity(self, output: Tensor, x: Tensor, times: Tensor) -> Tensor:
        if self.config.prediction == "velocity":
            return output
        return (output - x) / (1 - self.config.composite.per_entry(times)).clamp(min=MIN_REMAINING)

    def _heads(
        self, tokens: Tensor, condition: Tensor, norm: nn.Module, modulation: nn.Module, heads: nn.ModuleList
    ) -> Tensor:
        shift, scale = modulation(condition)[:, None].chunk(2, dim=-1)
        tokens = norm(tokens, shift, scale)
        latents = {
            s.name: unpatchify(head(tokens), s.patch_size, s.grid)
            for head, s in zip(heads, self.config.composite.streams, strict=True)
        }
        return self.config.composite.pack(latents).float()

    def _check(self, x: Tensor, times: Tensor, ends: Tensor | None, project: bool, second_head: bool) -> None:
        composite = self.config.composite
        if x.shape[1:] != (composite.size,):
            raise SFDError(f"expected packed latents (batch, {composite.size}), got {tuple(x.shape)}")
        if times.shape != (len(x), len(composite.streams)):
            raise SFDError(
                f"expected times {(len(x), len(composite.streams))}, one per stream, got {tuple(times.shape)}"
            )
        if (ends is not None) != bool(self.config.flow_map):
            raise SFDError(
                "this model was distilled: it predicts mean velocities, of steps whose end must be given"
                if self.config.flow_map
                else "this network predicts velocities, not those of steps with an end; distil it first (sfd distill)"
            )
        if project and self.projector is None:
            raise SFDError("this network has no REPA projector; set repa_block and repa_channels in its configuration")
        if second_head and self.config.guide_block is None:
            raise SFDError("this network has no second head; set guide_block in its configuration")


@lru_cache(maxsize=64)
def parameter_count(config: DiTConfig) -> int:
    """Number of trained parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in LightningDiT(config).parameters())


def _selective_context() -> Any:
    """Keep what matrix products and attention give: most of the time for a third of the memory."""
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    return create_selective_checkpoint_contexts(kept)


def _projector(width: int, hidden: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
    )
