"""The arithmetic of docs/scaling.md: its formulas are the code's, and the page shows what the script prints."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfd.latents import CompositeLatent, Stream
from sfd.models import dit as transformer
from sfd.models.dit import DiTConfig, LightningDiT

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


def config(size, grid=16, **fields):
    depth, width, heads = size
    streams = (Stream(name="texture", channels=32, grid=grid), Stream(name="semantic", channels=16, grid=grid))
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        composite=CompositeLatent(streams=streams),
        num_classes=1000,
        clocks=("semantic", "texture"),
        **fields,
    )


@pytest.mark.parametrize("name", ["XL", "XXL"])
def test_sizes_parameters_and_operations_are_the_networks(scaling, name):
    size, given = scaling.SIZES[name], scaling.Assumptions()
    assert size == transformer.SIZES[name]
    whole = config(size, repa_block=2, repa_channels=768)
    assert scaling.parameters(size, given) == transformer.parameter_count(whole)
    assert scaling.forward_flops(size, given) == transformer.flops(whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_block_keeps_for_the_backward_pass(scaling, checkpointing):
    """Bytes of saved tensors other than weights, for one image more in a block more."""
    width, grid = 384, 16

    def saved(depth: int, batch: int) -> int:
        network = LightningDiT(config((depth, width, 6), grid, checkpointing=checkpointing))
        held: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x, times = torch.randn(batch, network.config.composite.size), torch.rand(batch, 2)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            network(x, times, torch.zeros(batch, dtype=torch.long))
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    more = saved(2, 2) - saved(1, 2) - saved(2, 1) + saved(1, 1)
    given = scaling.Assumptions()
    expected = given.kept_checkpointed if checkpointing else given.kept
    assert more / (grid**2 * width) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("strategy", ["DDP", "FSDP", "HSDP"])
def test_one_gpu_has_nobody_to_talk_to(scaling, strategy):
    size, given = scaling.SIZES["XL"], scaling.Assumptions()
    assert scaling.communication(size, given, strategy, 1) == 0
    assert scaling.communication(size, given, strategy, 16) > scaling.communication(size, given, strategy, 8) > 0


def test_a_ring_all_reduce_moves_twice_the_gradients(scaling):
    """2·(n − 1)/n of 4 bytes a parameter, at the link's rate."""
    size, given = scaling.SIZES["XL"], scaling.Assumptions(link_share=1.0)
    expected = 2 * 7 / 8 * 4 * scaling.parameters(size, given) / given.nvlink
    assert scaling.communication(size, given, "DDP", 8) == pytest.approx(expected)


def test_the_page_shows_what_the_script_prints(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for title, rows in scaling.report(scaling.Assumptions()).items():
        assert rows in page, f"docs/scaling.md has another table for {title!r}; run benchmarks/scaling.py"


def test_flags_change_the_tables():
    printed = [
        subprocess.run(
            [sys.executable, "-I", str(SCRIPT), *flags], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
        for flags in ([], ["--mfu", "0.2"])
    ]
    assert "| XL | 546 |" in printed[0] and "| XL | 273 |" in printed[1]
