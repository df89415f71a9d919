"""The transformer: any composite and grid, independence of the batch, exact counts, fused kernels."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.compare import same_tensors
from helpers.dit import CLOCKS, EQUAL, configuration, inputs, random_dit
from sfd.latents import Stream
from sfd.models import kernels
from sfd.models.dit import LightningDiT, parameter_count
from sfd.models.dit_config import DiTConfig, flops
from sfd.models.layers import patchify, unpatchify

UNEQUAL = (Stream(name="texture", channels=3, grid=8, patch_size=2), Stream(name="semantic", channels=5, grid=4))
THREE = (*UNEQUAL, Stream(name="depth", channels=1, grid=12, patch_size=3))


CONFIGS = {
    "one clock": configuration(),
    "two clocks": configuration(clocks=CLOCKS),
    "unequal grids": configuration(UNEQUAL, clocks=("texture", "semantic")),
    "three streams": configuration(THREE, clocks=("depth", "semantic", "texture")),
    "one stream": configuration(EQUAL[:1], clocks=("texture",)),
    "unconditional": configuration(num_classes=0),
    "grid 6": configuration((Stream(name="pixels", channels=3, grid=24, patch_size=4),)),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> DiTConfig:
    return request.param


def test_output_does_not_depend_on_the_batch(config):
    model, (x, times, labels) = random_dit(config), inputs(config)
    together = model(x, times, labels).velocity
    alone = torch.cat([model(x[i : i + 1], times[i : i + 1], labels[i : i + 1]).velocity for i in range(len(x))])
    assert together.shape == x.shape
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_flops_equal_pytorchs_count(config):
    model, (x, times, labels) = random_dit(config), inputs(config, batch=1)
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, times, labels)
    assert counter.get_total_flops() == flops(config)


def test_parameters_are_counted(config):
    assert parameter_count(config) == sum(p.numel() for p in LightningDiT(config).parameters())


def test_velocity_is_zero_at_initialisation(config):
    assert not LightningDiT(config)(*inputs(config)).velocity.any()


def test_every_parameter_has_a_gradient():
    config = configuration(UNEQUAL, clocks=CLOCKS, repa_block=1, repa_width=16, repa_channels=7)
    model = random_dit(config)
    out = model(*inputs(config), project=True)
    (out.velocity.square().sum() + out.projection.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_clocks_give_the_order_of_the_time_embeddings():
    one, other = configuration(clocks=CLOCKS), configuration(clocks=("texture", "semantic"))
    a, b = random_dit(one), random_dit(other)
    b.load_state_dict(a.state_dict())
    x, times, labels = inputs(one)
    velocity = a(x, times, labels).velocity
    torch.testing.assert_close(velocity, b(x, times.flip(1), labels).velocity, rtol=0, atol=0)
    assert not torch.allclose(velocity, a(x, times.flip(1), labels).velocity)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unpatchify_inverts_patchify(patch):
    latent = torch.arange(2 * 5 * 36.0).reshape(2, 5, 6, 6)
    tokens = patchify(latent, patch)
    assert torch.equal(unpatchify(tokens, patch, 6), latent)
    second = latent[0, :, :patch, patch : 2 * patch].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[0, 1], second)


def test_checkpointing_gives_the_same_gradients_and_selective_repeats_no_product():
    gradients, counts = [], []
    for checkpointing in (False, True, "selective"):
        config = configuration(checkpointing=checkpointing, repa_block=2, repa_width=8, repa_channels=7)
        model = random_dit(config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = model(*inputs(config), project=True)
            (out.velocity.square().sum() + out.projection.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
        counts.append(counter.get_total_flops())
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in recomputed)
    assert counts[2] == counts[0] < counts[1]


def test_initial_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first = LightningDiT(configuration(), seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    again, other = (LightningDiT(configuration(), seed=seed).state_dict() for seed in (3, 4))
    assert same_tensors(first, again)
    assert not torch.equal(first["class_embedding.weight"], other["class_embedding.weight"])


def test_initialisation_follows_the_published_recipe():
    model = LightningDiT(configuration(width=192, heads=6))
    assert model.class_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.time_embedders[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / (192 + 576))
    assert model.blocks[0].attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.embeddings[1].weight.abs().max().item() == pytest.approx(math.sqrt(6 / (6 + 192)), rel=0.05)
    assert not any(block.modulation.weight.any() for block in model.blocks)


def test_bf16_autocast_stays_near_float32():
    config = configuration(clocks=CLOCKS)
    model, arguments = random_dit(config), inputs(config)
    exact = model(*arguments).velocity
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(*arguments).velocity
        assert model.embed(arguments[0]).dtype == torch.float32, "the residual stream is float32"
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_training_compiles_into_one_graph_without_recompiling(checkpointing):
    torch._dynamo.reset()
    config = configuration(checkpointing=checkpointing, repa_block=1, repa_width=8, repa_channels=7)
    model = random_dit(config.model_copy(deep=True)).train()  # of which nothing was ever called
    x, times, labels = inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            arguments = (x + step, times / (1 + step), labels)
            with torch.autocast("cpu", torch.bfloat16):
                out, plain = compiled(*arguments, project=True), model(*arguments, project=True)
            torch.testing.assert_close(out, plain, rtol=0.05, atol=0.05)
            (out.velocity.square().sum() + out.projection.float().square().sum()).backward()
            model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clocks": ("semantic", "pixels")}, "clocks must name each stream"),
        ({"clocks": ("semantic",)}, "clocks must name each stream"),
        ({"heads": 8}, "multiple of 4 channels"),
        ({"repa_block": 3, "repa_channels": 7}, "beyond the last block"),
        ({"repa_block": 1}, "given together"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        configuration(**changes)


def plain_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + kernels.EPSILON).sqrt()


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((value * weights).sum(), inputs)


def test_rms_norm_modulate_equals_its_formula():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    shift, scale = torch.randn(3, 1, 8, requires_grad=True), torch.randn(3, 1, 8, requires_grad=True)
    ours = kernels.rms_norm_modulate(x, weight, shift, scale)
    formula = plain_norm(x) * weight * (1 + scale) + shift
    torch.testing.assert_close(ours, formula)
    for a, b in zip(gradients(ours, x, weight, shift, scale), gradients(formula, x, weight, shift, scale), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_qk_norm_rope_equals_its_formula():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 2, 5, 6, requires_grad=True), torch.randn(2, 1, 6, requires_grad=True)
    angle = torch.randn(4, 1, 1, 3)
    ours = kernels.qk_norm_rope(x, weight, torch.stack([angle.cos(), angle.sin()], dim=-1))
    a, b = (plain_norm(x) * weight).unflatten(-1, (3, 2)).unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1).flatten(-2)
    torch.testing.assert_close(ours, turned)
    for one, other in zip(gradients(ours, x, weight), gradients(turned, x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
