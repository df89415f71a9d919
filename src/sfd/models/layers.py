"""Building blocks of the transformer: norms, position tables, rotary attention, SwiGLU, time embedding, patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfd.models import kernels

TIME_FREQUENCIES = 256
# Up to which plain products are faster than the fused attention kernel on CPUs; compiled, they lose two passes.
FEW_TOKENS, FEW_TOKENS_COMPILED = 128, 512


class Linear(nn.Linear):
    """A linear map that takes its input in the dtype of its weights, so that bf16 weights need no autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return super().forward(x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype))


class ModulatedNorm(nn.Module):
    """RMSNorm with a learned weight, followed by adaLN modulation; see `kernels.rms_norm_modulate`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(B, T, width) with shift and scale (B, 1, width) → (B, T, width), float32."""
        return kernels.rms_norm_modulate(x, self.weight, shift, scale)


def sincos_pos_embed(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (Dosovitskiy et al. 2021 in the form of He et al. 2022).

    The first half of the width encodes the column, the second the row, each as sines, then cosines.

    Returns:
        (grid², width), tokens row by row, on the CPU also where a network is built on the meta device.
    """
    place = torch.arange(grid, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angle = place[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis.expand(grid, grid, -1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid**2, width).float()


def rope_table(head_width: int, grid: int) -> Tensor:
    """Angles of the 2-D rotary embedding (Su et al. 2021), base 10000.

    The first half of a head's channels turns with the row, the second with the column; channels (0, 1), (2, 3), … are
    the pairs that turn together.

    Returns:
        (grid², head_width / 2, 2): cosine and sine of each pair's angle, tokens row by row.
    """
    half = head_width // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
    axis = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * frequency
    row = axis[:, None].expand(grid, grid, -1)
    column = axis.expand(grid, grid, -1)
    angle = torch.cat([row, column], dim=2).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()], dim=2).float()


class Attention(nn.Module):
    """Self-attention with RMS-normalised queries and keys and rotary positions.

    Queries and keys share one call of norm and rotation: half the kernels of doing each for itself.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.qk_weight = nn.Parameter(torch.ones(2, 1, width // heads))
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width); for `rope` see `kernels.qk_norm_rope`."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k = kernels.qk_norm_rope(qkv[:, :, :2], self.qk_weight, rope).transpose(1, 3).unbind(2)
        return self.out(_attend(q, k, qkv[:, :, 2].transpose(1, 2)).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of (B, H, T, D), in the dtype of `v`.

    On a CPU the fused bf16 kernel is slow where tokens are few (5 to 9 times the float32 one's time at 16 of them), and
    two plain products beat both there: 0.5 to 0.7 of the float32 kernel's time at 16 tokens, 0.6 to 1.1 at 64, 0.8 to
    1.5 at 256, with the backward pass; without, they are slower there.
    """
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    with torch.autocast("cpu", enabled=False):
        few = FEW_TOKENS_COMPILED if torch.compiler.is_compiling() else FEW_TOKENS
        if v.dtype == torch.float32 or v.shape[2] > few:
            return F.scaled_dot_product_attention(q, k, v.float()).to(v.dtype)
        batch = v.shape[:2]
        q, k, v = (x.to(v.dtype).flatten(0, 1) for x in (q, k, v))
        logits = torch.bmm(q, k.transpose(1, 2)).float() * q.shape[-1] ** -0.5
        return torch.bmm(logits.softmax(dim=-1).to(v.dtype), v).unflatten(0, batch)


class SwiGLU(nn.Module):
    """w3(SiLU(a) · b) with (a, b) = w12(x) (Shazeer 2020); ⌊2/3 · 4 · width⌋ wide, as many weights as a plain MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class TimeEmbedder(nn.Module):
    """A time in [0, 1] as 256 sinusoids of t itself, then a SiLU MLP."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) → (B, width)."""
        angle = t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class Block(nn.Module):
    """One transformer block; shift, scale and gate of both its halves come from the condition (adaLN-zero, DiT)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = ModulatedNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = ModulatedNorm(width)
        self.mlp = SwiGLU(width)
        self.modulation = Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """(B, T, width) → the same; `condition` is (B, width), already through its SiLU."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attention(self.attention_norm(x, shift_a, scale_a), rope))
        return torch.addcmul(x, gate_m, self.mlp(self.mlp_norm(x, shift_m, scale_m)))


def patchify(latent: Tensor, patch_size: int) -> Tensor:
    """(B, C, G, G) → (B, T, p·p·C): tokens row by row, each holding its patch row by row, channels last."""
    if patch_size == 1:
        return latent.flatten(2).mT
    cut = latent.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # B, C, row, p, column, p
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, grid: int) -> Tensor:
    """Undo `patchify`: (B, T, p·p·C) → (B, C, grid, grid)."""
    if patch_size == 1:
        return tokens.mT.unflatten(2, (grid, grid))
    side = grid // patch_size
    cut = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (side, side))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
