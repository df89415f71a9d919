"""`sfd convert`: every tensor of published weights is used or reported; no code of a file is executed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.cli import done, refused, sfd
from helpers.compare import same_tensors
from sfd.convert import transformer as published
from sfd.convert.checkpoint import plain, read_checkpoint
from sfd.encoders import open_texture
from sfd.generation.model import load_model
from sfd.models.compressor import load_compressor
from small_published import TRANSFORMER, published_config, random_transformer, to_published

GOLDEN = Path(__file__).parent / "golden"
# 4 texture channels, as the reference autoencoder has, and 3 semantic ones; patch 2.
SMALL = TRANSFORMER | {"in_channels": 7, "semantic_chans": 3, "patch_size": 2}
# As the published trainer's YAML has it, of the same network.
TRAINED_WITH = {
    "data": {"num_classes": 5, "latent_norm": True, "latent_multiplier": 1.0},
    "model": {"model_type": "LightningDiT-XL/2", "semantic_chans": 3, "semfirst_delta_t": 0.2, "repa_feat_depth": 1},
    "train": {"max_steps": 4000000, "weight_init": None, "betas": [0.9, 0.999]},
}


def state_of(config) -> dict[str, Tensor]:
    network = random_transformer(config, 0)
    return to_published(network.state_dict(), network.config)


def converted(folder: Path) -> dict[str, Tensor]:
    """The tensors of a converted model under their published names."""
    network = load_model(folder, torch.device("cpu")).transformer
    return to_published(network.state_dict(), network.config)


@pytest.fixture(scope="module")
def texture(tmp_path_factory) -> Path:
    """The reference autoencoder, converted."""
    folder = tmp_path_factory.mktemp("texture") / "vae"
    done("convert", GOLDEN / "ldm_vae.weights.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for key, channels in (("latents", 4), ("latents_sv", 3)):
        values = {"mean": torch.linspace(-1, 1, channels), "std": torch.linspace(0.5, 2, channels)}
        torch.save({k: v.view(1, -1, 1, 1) for k, v in values.items()}, folder / f"{key}_stats.pt")
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """As the published trainer saves it, configuration object included."""
    ema, path = state_of(SMALL), tmp_path / "0400000.pt"
    model = {name: tensor + 1 for name, tensor in ema.items()}
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    values = {"model": model, "ema": ema, "opt": optimizer.state_dict(), "config": OmegaConf.create(TRAINED_WITH)}
    torch.save(values, path)
    return path


@pytest.fixture
def needed(texture, statistics) -> tuple:
    return ("--texture", texture, "--statistics", statistics)


class TestTransformer:
    def test_a_published_checkpoint_gives_a_model_that_samples(self, checkpoint, needed, tmp_path):
        model, classes = tmp_path / "model", tmp_path / "classes.txt"
        classes.write_text("ant\nbee\ncat\ndog\nelk\n")
        output = done("convert", checkpoint, model, *needed, "--classes", classes)
        assert "config, model, opt" in output and "omegaconf.dictconfig.DictConfig" in output
        done("sample", model, "--classes", "bee", "--seeds", "0-1", "--steps", "3", "--out", tmp_path / "samples")
        assert Image.open(tmp_path / "samples" / "000000.png").size == (8, 8)
        assert same_tensors(converted(model), state_of(SMALL))

    def test_the_model_has_the_checkpoints_settings_and_statistics(self, checkpoint, needed, tmp_path):
        done("convert", checkpoint, tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec["delta"] == 0.2
        assert model.transformer.config.repa_block == 1 and model.classes == ("0", "1", "2", "3", "4")
        texture, semantic = model.composite.streams
        assert texture.mean == pytest.approx((-1, -1 / 3, 1 / 3, 1)) and semantic.std == pytest.approx((0.5, 1.25, 2))
        assert texture.tokenizer == model.texture.identity and semantic.weight == 2

    def test_weights_without_ema(self, needed, tmp_path):
        state = state_of(SMALL)
        other = {n: t if n in published.TABLES else t + 1 for n, t in state.items()}
        torch.save({"ema": state, "model": other}, tmp_path / "c.pt")
        done("convert", tmp_path / "c.pt", tmp_path / "model", *needed, "--weights", "model", "--repa-block", 1)
        assert torch.equal(converted(tmp_path / "model")["x_embedder.proj.bias"], other["x_embedder.proj.bias"])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, needed, tmp_path):
        state = {name: tensor.to(dtype) for name, tensor in state_of(SMALL).items()}
        save_file(state, tmp_path / "half.safetensors")
        done("convert", tmp_path / "half.safetensors", tmp_path / "model", *needed)
        assert same_tensors({name: tensor.to(dtype) for name, tensor in converted(tmp_path / "model").items()}, state)

    def test_non_finite_weights_are_refused(self, needed, tmp_path):
        state = state_of(SMALL)
        state["x_embedder.proj.bias"][0] = float("nan")
        save_file(state, tmp_path / "diverged.safetensors")
        result = sfd("convert", tmp_path / "diverged.safetensors", tmp_path / "model", *needed)
        refused(result, "x_embedder.proj.bias", "not finite")

    def test_a_synchronous_model_without_statistics(self, texture, tmp_path):
        save_file(state_of(SMALL | {"semfirst_delta_t": 0.0, "use_repa": False}), tmp_path / "bare.safetensors")
        options = ("--texture", texture, "--statistics", "none", "--semantic-channels", 3, "--classes", 5)
        done("convert", tmp_path / "bare.safetensors", tmp_path / "model", *options)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec == {"name": "synchronous"} and model.composite["texture"].mean == ()

    def test_statistics_of_other_latents_are_refused(self, texture, tmp_path):
        torch.save({"ema": state_of(SMALL | {"in_channels": 8, "semantic_chans": 4})}, tmp_path / "c.pt")
        given = ("--texture", texture, "--statistics", GOLDEN / "latent_shards")
        refused(sfd("convert", tmp_path / "c.pt", tmp_path / "model", *given), "have 8 channels", "have 4")

    def test_a_trained_model_survives_the_round_trip(self, finished, tmp_path):
        folder, original = finished.folder, load_model(finished.folder.model, torch.device("cpu"))
        state = to_published(original.transformer.state_dict(), original.transformer.config)
        save_file(state, tmp_path / "published.safetensors")
        (tmp_path / "classes.txt").write_text("\n".join(original.classes))
        needed = ("--texture", folder.texture, "--statistics", folder.latents, "--classes", tmp_path / "classes.txt")
        done("convert", tmp_path / "published.safetensors", tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.composite == original.composite and model.schedule.spec == original.schedule.spec
        assert same_tensors(model.transformer.state_dict(), original.transformer.state_dict())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"--statistics": None}, ("--statistics", "none")),
            ({"--semantic-channels": 2}, ("--semantic-channels is 2", "semantic_chans = 3")),
            ({"--classes": 7}, ("7 classes", "5 and the null class")),
            ({"--classes": 6}, ("label dropout",)),
            ({"--delta": 0.5}, ("--delta is 0.5", "0.2")),
        ],
    )
    def test_options_that_contradict_the_checkpoint_are_refused(self, options, words, checkpoint, needed, tmp_path):
        given = dict(zip(needed[::2], needed[1::2], strict=True)) | options
        arguments = [a for option, value in given.items() if value is not None for a in (option, value)]
        refused(sfd("convert", checkpoint, tmp_path / "model", *arguments), *words)
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("blocks.1.norm1.weight", None, 'Missing key(s) in state_dict: "blocks.1.attention_norm.weight"'),
            ("blocks.1.norm3.weight", torch.ones(32), 'Unexpected key(s) in state_dict: "blocks.1.norm3.weight"'),
            ("blocks.1.norm1.weight", torch.ones(31), "size mismatch for blocks.1.attention_norm.weight"),
            ("blocks.1.attn.k_norm.weight", None, "blocks.1.attn.q_norm.weight"),
            ("x_embedder.proj.weight", torch.ones(3), "published transformer"),
            ("feat_rope.freqs_cos", torch.zeros(4, 16), "feat_rope.freqs_cos"),
        ],
    )
    def test_a_tensor_that_does_not_fit_is_named(self, name, tensor, words, needed, tmp_path):
        state = state_of(SMALL)
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
        save_file(state, tmp_path / "c.safetensors")
        refused(sfd("convert", tmp_path / "c.safetensors", tmp_path / "model", *needed), words)

    def test_a_network_without_a_null_class_gets_one(self):
        state, config = state_of(SMALL), published_config(SMALL)
        state[published.LABELS] = state[published.LABELS][:-1]
        table = published.from_published(state, config)["class_embedding.weight"]
        assert torch.equal(table[:-1], state[published.LABELS]) and not table[-1].any()


class TestSemVAE:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        state = load_file(GOLDEN / "semvae.weights.safetensors")
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"step": 3}}, tmp_path / "semvae.pt")
        return tmp_path / "semvae.pt"

    def test_latents_equal_the_reference(self, source, tmp_path):
        output = done("convert", source, tmp_path / "part", "--heads", 4)
        assert "optimizer_state_dict" in output
        features, mean = (load_file(GOLDEN / "semvae.io.safetensors")[name] for name in ("features", "mean"))
        ours = load_compressor(tmp_path / "part").encode(features.transpose(1, 2).unflatten(2, (4, 4)))
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-5)

    def test_heads_must_divide_the_width(self, source, tmp_path):
        refused(sfd("convert", source, tmp_path / "part"), "width 32 does not divide into 6 heads")


class TestAutoencoder:
    def test_diffusers_loads_the_converted_folder(self, texture):
        from diffusers import AutoencoderKL

        network, information = AutoencoderKL.from_pretrained(texture, output_loading_info=True)
        assert not any(information.values())
        io = load_file(GOLDEN / "ldm_vae.io.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(network.encode(io["images"]).latent_dist.mean, io["mean"], rtol=0, atol=1e-5)
        assert open_texture(str(texture)).channels == 4

    def test_tensors_used_in_training_alone_are_left_out(self, texture, tmp_path):
        state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
        extra = {name: torch.ones(2) for name in ("loss.logvar", "foundation_model.norm.bias", "linear_proj.weight")}
        torch.save({"state_dict": state | extra, "epoch": 49}, tmp_path / "vae.ckpt")
        output = done("convert", tmp_path / "vae.ckpt", tmp_path / "vae")
        assert "(3): foundation_model.norm.bias, linear_proj.weight, loss.logvar" in output and "epoch" in output
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "vae" / name).read_bytes() == (texture / name).read_bytes()


class CfgNode(dict):
    """A dictionary with attributes, as several configuration libraries have."""


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestForeignObjects:
    @pytest.mark.parametrize(
        ("config", "held"),
        [
            (OmegaConf.create(TRAINED_WITH), TRAINED_WITH),
            (argparse.Namespace(model="SiT-XL/2", path=None), {"model": "SiT-XL/2", "path": None}),
            (CfgNode(delta=0.3), {"delta": 0.3}),
        ],
        ids=["omegaconf", "argparse", "dictionary"],
    )
    def test_objects_of_other_libraries_become_placeholders(self, config, held, tmp_path):
        torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "args": config}, tmp_path / "c.pt")
        read = read_checkpoint(tmp_path / "c.pt")
        assert read.state == "ema" and torch.equal(read.tensors["w"], torch.zeros(2))
        assert plain(read.others["args"]) == held and type(read.others["args"]) is not type(config)
        assert any(name.rpartition(".")[2] == type(config).__name__ for name in read.foreign)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_of_wrappers_are_removed(self, prefix, tmp_path):
        torch.save({"ema": {f"{prefix}w": torch.ones(2), f"{prefix}module.b": torch.ones(1)}}, tmp_path / "c.pt")
        assert read_checkpoint(tmp_path / "c.pt").tensors.keys() == {"w", "module.b"}

    @pytest.mark.parametrize("way", ["zip", "older", "plain pickle"])
    @pytest.mark.parametrize("function", [os.system, eval, __import__], ids=["system", "eval", "import"])
    def test_a_pickle_that_calls_a_function_is_refused(self, way, function, tmp_path):
        path, trace = tmp_path / "c.pt", tmp_path / "it ran"
        code = Calls(function, f"touch '{trace}'" if function is os.system else f"open({str(trace)!r}, 'w')")
        if way == "plain pickle":
            path.write_bytes(pickle.dumps({"config": code}))
        else:
            torch.save({"ema": {"w": torch.ones(2)}, "config": code}, path, _use_new_zipfile_serialization=way == "zip")
        refused(sfd("convert", path, tmp_path / "model"), "c.pt", "nothing of it was run")
        assert not trace.exists() and not (tmp_path / "model").exists()


def gigantic(path):
    """A safetensors file whose header promises 2⁵² bytes."""
    entry = {"dtype": "F32", "shape": [1 << 40, 1 << 10], "data_offsets": [0, 1 << 52]}
    header = json.dumps({"encoder.0.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def truncated(path):
    torch.save({"ema": {"encoder.0.weight": torch.ones(64, 64)}}, path)
    path.write_bytes(path.read_bytes()[:9000])


DAMAGED = {
    "truncated.pt": truncated,
    "gigantic.safetensors": gigantic,
    "expanded.pt": lambda path: torch.save({"ema": {"x.weight": torch.ones(1).expand(1 << 40, 7)}}, path),
    "no-dictionary.pt": lambda path: torch.save(torch.ones(3), path),
    "no-weights.pt": lambda path: torch.save({"epoch": 3, "best": 0.5}, path),
    "unknown.pt": lambda path: torch.save({"state_dict": {"conv.weight": torch.ones(3)}}, path),
    "random.pt": lambda path: path.write_bytes(b"\x80" + bytes(range(256))),
    "random.safetensors": lambda path: path.write_bytes(b"not a checkpoint"),
    "missing.pt": lambda path: None,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_and_nothing_is_written(name, tmp_path):
    DAMAGED[name](tmp_path / name)
    refused(sfd("convert", tmp_path / name, tmp_path / "out"), name)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
