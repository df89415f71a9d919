"""The network prepared for sampling: near the plain one, compiled once for all batches, refused where it cannot be."""

from __future__ import annotations

import sysconfig

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from random_model import CLASSES, COMPOSITE, random_model
from sfd.cli import main as cli
from sfd.generation.generate import SamplingConfig, decode, generate, with_compile
from sfd.generation.model import Model
from sfd.models import inference
from sfd.models.inference import Inference, cannot_compile, compiling_pays
from sfd.sampling import initial_noise
from sfd.utils import files
from sfd.utils.device import slow_bf16
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")
TIMES = torch.tensor([0.3, 0.6])


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(0)


def velocity(network: Inference, images: int, times: Tensor = TIMES) -> Tensor:
    return network(initial_noise(range(images), COMPOSITE), times, torch.arange(images) % len(CLASSES))


def relative_error(rough: Tensor, exact: Tensor) -> float:
    return ((rough - exact).norm() / exact.norm()).item()


def test_bf16_keeps_norms_times_and_ends_in_float32(model):
    network = Inference(model.transformer, "bf16").network
    rough = {name for name, p in network.named_parameters() if p.dtype == torch.bfloat16}
    assert rough == {
        f"blocks.0.{module}.{kind}"
        for module in ("attention.qkv", "attention.out", "mlp.w12", "mlp.w3", "modulation")
        for kind in ("weight", "bias")
    }
    assert all(p.dtype == torch.float32 for p in model.transformer.parameters()), "the model itself must not change"


def test_bf16_is_no_further_off_than_autocast(model):
    exact = velocity(model.inference(), 8)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = relative_error(velocity(model.inference(), 8), exact)
    assert 0 < relative_error(velocity(model.inference("bf16"), 8), exact) < autocast


@pytest.mark.slow
def test_compiled_once_for_all_batches_labels_and_times(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = Inference(model.transformer, "bf16", compiled=True)
    exact = Inference(model.transformer, "bf16")
    for images in (5, 1, 2, 7):
        assert relative_error(velocity(network, images), velocity(exact, images)) < 5e-3
    each = torch.rand(5, 2)
    assert relative_error(velocity(network, 5, each), velocity(exact, 5, each)) < 5e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_samples_in_bf16_are_near_those_in_float32(model):
    def sampled(precision: str) -> tuple[Tensor, Tensor]:
        settings = SamplingConfig(steps=6, guidance=1.5, precision=precision)
        batch = next(generate(model, [0, 1], [3, 4], settings))
        return batch.latents, torch.from_numpy(batch.images).float()

    (exact, images), (rough, rough_images) = sampled("float32"), sampled("bf16")
    assert 0 < relative_error(rough, exact) < 0.02
    assert (images - rough_images).abs().mean() < 1


def test_decoding_in_bf16_is_near_float32(model):
    x = initial_noise(range(40), COMPOSITE)  # more than are decoded at once
    exact, rough = decode(model, x).astype(int), decode(model, x, "bf16").astype(int)
    assert 0 < abs(exact - rough).max() <= 4


def test_compiling_is_decided_by_the_work(model, monkeypatch):
    settings = SamplingConfig()
    assert with_compile(settings, model, None, 10).compile == "off"
    assert with_compile(settings, model, None, 10**12).compile == "on"
    asked = settings.model_copy(update={"compile": "on"})
    assert with_compile(asked, model, None, 1) is asked
    assert not compiling_pays(1e30, torch.device("meta")), "devices without a rule are left alone"
    monkeypatch.setattr(inference, "COMPILING_PAYS", {"cpu": 0.0})
    monkeypatch.setenv("PATH", "")
    assert with_compile(settings, model, None, 10**12).compile == "off", "without a compiler"


def test_compiling_without_a_compiler_is_refused(model, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cannot_compile(CPU) is not None
    with pytest.raises(SFDError, match="there is no C\\+\\+ compiler"):
        Inference(model.transformer, compiled=True)


def test_compiling_without_python_s_headers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "python3-dev" in cannot_compile(CPU)


def test_a_gpu_s_compiler_needs_one_for_c(tmp_path, monkeypatch):
    program = tmp_path / "g++"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert cannot_compile(CPU) is None
    assert "C compiler (gcc" in cannot_compile(torch.device("cuda"))


def test_a_folder_keeps_its_decision(model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "s"), "--seeds", "0", "--steps", "3"]
    assert CliRunner().invoke(cli.main, [*command, "--device", "cpu"]).exit_code == 0
    assert files.read_json(tmp_path / "s" / "samples.json", "samples")["sampling"]["compile"] == "off"
    monkeypatch.setattr(inference, "COMPILING_PAYS", {"cpu": 0.0})
    assert CliRunner().invoke(cli.main, [*command, "--device", "cpu"]).exit_code == 0
    refused = CliRunner().invoke(cli.main, [*command, "--device", "cpu", "--compile", "on"])
    assert refused.exit_code == 2 and "sampling.compile = 'off', but this command has 'on'" in refused.output


def test_bf16_without_instructions_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert "no bf16 instructions" in str(slow_bf16(CPU))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert slow_bf16(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, slow in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert ("Tesla T4 has no bf16 units" in str(slow_bf16(torch.device("cuda")))) == slow


def test_sampling_in_bf16_without_instructions_says_so_and_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    model.save(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "s"), "--seeds", "0", "--steps", "3"]
    result = CliRunner().invoke(cli.main, [*command, "--precision", "bf16", "--device", "cpu"])
    assert result.exit_code == 0 and "no bf16 instructions" in result.output
