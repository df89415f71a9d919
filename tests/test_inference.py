"""The network prepared for sampling: bf16, compiled once for all batches, refused without a compiler."""

from __future__ import annotations

import sysconfig

import pytest
import torch
from torch import Tensor

from helpers.random_model import CLASSES, COMPOSITE, random_model
from sfd.generation.model import Model
from sfd.models.inference import Inference, cannot_compile
from sfd.sampling import initial_noise
from sfd.utils.device import slow_bf16
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")
TIMES = torch.tensor([0.3, 0.6])


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


def velocity(network: Inference, images: int, times: Tensor = TIMES) -> Tensor:
    return network.velocity(torch.arange(images) % len(CLASSES))(initial_noise(range(images), COMPOSITE), times)


def relative_error(rough: Tensor, exact: Tensor) -> float:
    return ((rough - exact).norm() / exact.norm()).item()


def test_bf16_is_more_accurate_than_autocast(model):
    exact = velocity(model.inference(), 8)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = relative_error(velocity(model.inference(), 8), exact)
    rough = velocity(model.inference("bf16"), 8)
    assert rough.dtype == torch.float32
    assert 0 < relative_error(rough, exact) < autocast
    assert all(p.dtype == torch.float32 for p in model.transformer.parameters()), "the model itself is unchanged"


def test_a_pair_has_both_velocities(model):
    x, labels = initial_noise(range(3), COMPOSITE), torch.tensor([0, 1, 2])
    null = torch.full_like(labels, 3)
    v_c, v_g = model.inference().pair(labels, null)(x, TIMES)
    torch.testing.assert_close(v_c, model.inference().velocity(labels)(x, TIMES))
    torch.testing.assert_close(v_g, model.inference().velocity(null)(x, TIMES))


@pytest.mark.slow
def test_one_compiled_network_serves_all_batch_sizes(model):
    torch._dynamo.reset()
    network, exact = Inference(model.transformer, "bf16", compiled=True), Inference(model.transformer, "bf16")
    for images in (5, 1, 2, 7):
        assert relative_error(velocity(network, images), velocity(exact, images)) < 5e-3
    assert relative_error(velocity(network, 5, TIMES / 2), velocity(exact, 5, TIMES / 2)) < 5e-3


def test_compiling_without_a_compiler_is_refused(model, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "nowhere")
    assert "python3-dev" in cannot_compile(CPU)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cannot_compile(CPU) is not None
    with pytest.raises(SFDError, match="C\\+\\+ compiler"):
        Inference(model.transformer, compiled=True)


def test_compiling_for_a_gpu_needs_a_c_compiler(tmp_path, monkeypatch):
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert cannot_compile(CPU) is None
    assert "C compiler (gcc" in cannot_compile(torch.device("cuda"))


def test_slow_bf16_is_detected(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert "no bf16 instructions" in str(slow_bf16(CPU))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert slow_bf16(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, slow in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert ("Tesla T4 has no bf16 units" in str(slow_bf16(torch.device("cuda")))) == slow
