"""`sfd convert`: published weights in, samples out; every tensor accounted for, nothing run or half-written."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfd.cli.main import main
from sfd.convert import autoencoder, semvae
from sfd.convert import transformer as published
from sfd.convert.checkpoint import plain, read_checkpoint
from sfd.encoders import open_texture
from sfd.generation.model import load_model
from sfd.latents import CompositeLatent, Stream
from sfd.models.compressor import load_compressor
from sfd.models.dit import SIZES, DiTConfig
from sfd.models.semvae import SemVAEConfig
from sfd.utils.errors import SFDError
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


def sfd(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert "Traceback" not in result.output, result.output
    return result


def done(*arguments) -> str:
    result = sfd(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments, words: tuple[str, ...]) -> None:
    result = sfd(*arguments)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
    """As a training run of the published code leaves it: the same call, with the same library's object."""
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
    def test_from_a_published_checkpoint_to_samples(self, checkpoint, needed, tmp_path):
        model, classes = tmp_path / "model", tmp_path / "classes.txt"
        classes.write_text("ant\nbee\ncat\ndog\nelk\n")
        output = done("convert", checkpoint, model, *needed, "--classes", classes)
        assert "config, model, opt" in output and "omegaconf.dictconfig.DictConfig" in output
        done("sample", model, "--classes", "bee", "--seeds", "0-1", "--steps", "3", "--out", tmp_path / "samples")
        assert Image.open(tmp_path / "samples" / "000000.png").size == (8, 8)
        assert same(converted(model), state_of(SMALL))

    def test_what_the_model_knows(self, checkpoint, needed, tmp_path):
        done("convert", checkpoint, tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec["delta"] == 0.2  # from the checkpoint's configuration
        assert model.transformer.config.repa_block == 1 and model.classes == ("0", "1", "2", "3", "4")
        texture, semantic = model.composite.streams
        assert texture.mean == pytest.approx((-1, -1 / 3, 1 / 3, 1)) and semantic.std == pytest.approx((0.5, 1.25, 2))
        assert texture.tokenizer == model.texture.identity and semantic.weight == 2

    def test_the_weights_that_are_not_averaged(self, needed, tmp_path):
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
        assert same({name: tensor.to(dtype) for name, tensor in converted(tmp_path / "model").items()}, state)

    def test_weights_that_are_not_finite(self, needed, tmp_path):
        state = state_of(SMALL)
        state["x_embedder.proj.bias"][0] = float("nan")
        save_file(state, tmp_path / "diverged.safetensors")
        words = ("x_embedder.proj.bias", "not finite")
        refused("convert", tmp_path / "diverged.safetensors", tmp_path / "model", *needed, words=words)

    def test_one_clock_without_statistics(self, texture, tmp_path):
        save_file(state_of(SMALL | {"semfirst_delta_t": 0.0, "use_repa": False}), tmp_path / "bare.safetensors")
        options = ("--texture", texture, "--statistics", "none", "--semantic-channels", 3, "--classes", 5)
        done("convert", tmp_path / "bare.safetensors", tmp_path / "model", *options)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec == {"name": "synchronous"} and model.composite["texture"].mean == ()

    def test_statistics_of_other_latents(self, texture, tmp_path):
        torch.save({"ema": state_of(SMALL | {"in_channels": 8, "semantic_chans": 4})}, tmp_path / "c.pt")
        given = ("--texture", texture, "--statistics", GOLDEN / "latent_shards")
        refused("convert", tmp_path / "c.pt", tmp_path / "model", *given, words=("have 8 channels", "have 4"))

    def test_a_model_trained_here(self, finished, tmp_path):
        folder, original = finished.folder, load_model(finished.folder.model, torch.device("cpu"))
        state = to_published(original.transformer.state_dict(), original.transformer.config)
        save_file(state, tmp_path / "published.safetensors")
        (tmp_path / "classes.txt").write_text("\n".join(original.classes))
        needed = ("--texture", folder.texture, "--statistics", folder.latents, "--classes", tmp_path / "classes.txt")
        done("convert", tmp_path / "published.safetensors", tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.composite == original.composite and model.schedule.spec == original.schedule.spec
        assert same(model.transformer.state_dict(), original.transformer.state_dict())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"--texture": None}, ("--texture",)),
            ({"--statistics": None}, ("--statistics", "none")),
            ({"--statistics": "nowhere"}, ("no such file or folder",)),
            ({"--semantic-channels": 2}, ("--semantic-channels is 2", "semantic_chans = 3")),
            ({"--classes": 7}, ("7 classes", "5 and the null class")),
            ({"--classes": 6}, ("label dropout",)),
            ({"--delta": 0.5}, ("--delta is 0.5", "0.2")),
            ({"--repa-block": 2}, ("--repa-block is 2", "1")),
        ],
    )
    def test_contradictions(self, options, words, checkpoint, needed, tmp_path):
        given = dict(zip(needed[::2], needed[1::2], strict=True)) | options
        arguments = [a for option, value in given.items() if value is not None for a in (option, value)]
        refused("convert", checkpoint, tmp_path / "model", *arguments, words=words)
        assert not (tmp_path / "model").exists()

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("blocks.1.norm1.weight", None, "missing: blocks.1.attention_norm.weight"),
            ("blocks.1.norm3.weight", torch.ones(32), "unexpected: blocks.1.norm3.weight"),
            ("blocks.1.norm1.weight", torch.ones(31), "misshapen: blocks.1.attention_norm.weight"),
            ("blocks.1.attn.k_norm.weight", None, "blocks.1.attn.q_norm.weight"),
            ("final_layer.linear.weight", torch.ones(3, 32), "final_layer.linear.weight"),
            ("x_embedder.proj.weight", torch.ones(3), "published transformer"),
            ("pos_embed", torch.ones(1), "published transformer"),
            ("feat_rope.freqs_cos", torch.zeros(4, 16), "feat_rope.freqs_cos"),
        ],
    )
    def test_tensors_that_do_not_fit(self, name, tensor, words, needed, tmp_path):
        state = state_of(SMALL)
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
        save_file(state, tmp_path / "c.safetensors")
        refused("convert", tmp_path / "c.safetensors", tmp_path / "model", *needed, words=(words,))

    def test_a_network_without_a_null_class_gets_one(self):
        state, config = state_of(SMALL), published_config(SMALL)
        state[published.LABELS] = state[published.LABELS][:-1]
        table = published.from_published(state, config)["class_embedding.weight"]
        assert torch.equal(table[:-1], state[published.LABELS]) and not table[-1].any()

    @pytest.mark.parametrize(("size", "file"), [("B", "b-1"), ("L", "l-1"), ("XL", "xl-1"), ("XXL", "1p0b-1")])
    def test_shapes_tell_the_configuration_of_each_published_network(self, size, file):
        keys = json.loads((GOLDEN / f"keys_lightningdit-{file}.json").read_text())["state_dict"]
        streams = Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16, weight=2)
        assert published.inferred_config({n: tuple(s) for n, s in keys.items()}, semantic=16) == DiTConfig(
            **SIZES[size]._asdict(),
            composite=CompositeLatent(streams=streams),
            num_classes=1000,
            clocks=("semantic", "texture"),
            repa_block=2,
            repa_channels=768,
        )


class TestSemVAE:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        state = load_file(GOLDEN / "semvae.weights.safetensors")
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"step": 3}}, tmp_path / "semvae.pt")
        return tmp_path / "semvae.pt"

    def test_latents_are_the_published_ones(self, source, tmp_path):
        output = done("convert", source, tmp_path / "part", "--heads", 4)
        assert "optimizer_state_dict" in output
        features, mean = (load_file(GOLDEN / "semvae.io.safetensors")[name] for name in ("features", "mean"))
        ours = load_compressor(tmp_path / "part").encode(features.transpose(1, 2).unflatten(2, (4, 4)))
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-5)

    def test_heads_that_do_not_divide_the_width(self, source, tmp_path):
        refused("convert", source, tmp_path / "part", words=("width 32 does not divide into 6 heads",))

    def test_shapes_tell_all_but_the_heads(self):
        keys = json.loads((GOLDEN / "keys_semvae.json").read_text())["state_dict"]
        assert semvae.inferred_config({name: tuple(shape) for name, shape in keys.items()}) == SemVAEConfig()


class TestAutoencoder:
    def test_diffusers_loads_it(self, texture):
        from diffusers import AutoencoderKL

        network, information = AutoencoderKL.from_pretrained(texture, output_loading_info=True)
        assert not any(information.values())
        io = load_file(GOLDEN / "ldm_vae.io.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(network.encode(io["images"]).latent_dist.mean, io["mean"], rtol=0, atol=1e-5)
        assert open_texture(str(texture)).channels == 4

    def test_what_training_needs_is_left_out(self, texture, tmp_path):
        state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
        extra = {name: torch.ones(2) for name in ("loss.logvar", "foundation_model.norm.bias", "linear_proj.weight")}
        torch.save({"state_dict": state | extra, "epoch": 49}, tmp_path / "vae.ckpt")
        output = done("convert", tmp_path / "vae.ckpt", tmp_path / "vae")
        assert "(3): foundation_model.norm.bias, linear_proj.weight, loss.logvar" in output and "epoch" in output
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "vae" / name).read_bytes() == (texture / name).read_bytes()

    @pytest.mark.parametrize("name", ["decoder.up.0.block.1.conv2.bias", "encoder.conv_in.weight"])
    def test_a_missing_tensor_is_named(self, name):
        state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
        config = autoencoder.inferred_config(shapes(state))
        del state[name]
        with pytest.raises(SFDError, match="conv2.bias|conv_in.weight"):  # noqa: RUF043
            autoencoder.from_published(state, config)

    def test_channels_that_do_not_divide_into_groups(self):
        state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
        config = autoencoder.inferred_config(shapes(state)) | {"block_out_channels": [32, 48]}
        with pytest.raises(SFDError, match="no LDM autoencoder of these shapes"):
            autoencoder.from_published(state, config)


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
    def test_they_become_placeholders(self, config, held, tmp_path):
        torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "args": config}, tmp_path / "c.pt")
        read = read_checkpoint(tmp_path / "c.pt")
        assert read.state == "ema" and torch.equal(read.tensors["w"], torch.zeros(2))
        assert plain(read.others["args"]) == held and type(read.others["args"]) is not type(config)
        assert any(name.rpartition(".")[2] == type(config).__name__ for name in read.foreign)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_of_wrappers_are_taken_off(self, prefix, tmp_path):
        torch.save({"ema": {f"{prefix}w": torch.ones(2), f"{prefix}module.b": torch.ones(1)}}, tmp_path / "c.pt")
        assert read_checkpoint(tmp_path / "c.pt").tensors.keys() == {"w", "module.b"}

    @pytest.mark.parametrize("way", ["zip", "older", "plain pickle"])
    @pytest.mark.parametrize("function", [os.system, eval, __import__], ids=["system", "eval", "import"])
    def test_code_is_refused(self, way, function, tmp_path):
        path, trace = tmp_path / "c.pt", tmp_path / "it ran"
        code = Calls(function, f"touch '{trace}'" if function is os.system else f"open({str(trace)!r}, 'w')")
        if way == "plain pickle":
            path.write_bytes(pickle.dumps({"config": code}))
        else:
            torch.save({"ema": {"w": torch.ones(2)}, "config": code}, path, _use_new_zipfile_serialization=way == "zip")
        refused("convert", path, tmp_path / "model", words=("c.pt", "nothing of it was run"))
        assert not trace.exists() and not (tmp_path / "model").exists()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 2731523448\n"


def damaged(kind: str, path: Path) -> None:
    if kind == "truncated safetensors":
        save_file({"encoder.0.weight": torch.ones(64, 64)}, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "truncated zip":
        torch.save({"ema": {"encoder.0.weight": torch.ones(64, 64)}}, path)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "gigantic safetensors":
        entry = {"dtype": "F32", "shape": [1 << 40, 1 << 10], "data_offsets": [0, 1 << 52]}
        header = json.dumps({"encoder.0.weight": entry}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
    elif kind == "gigantic tensor":
        torch.save({"ema": {"x_embedder.proj.weight": torch.ones(1).expand(1 << 40, 7, 1, 1)}}, path)
    elif kind == "no dictionary":
        torch.save(torch.ones(3), path)
    elif kind == "no weights":
        torch.save({"epoch": 3, "best": 0.5}, path)
    elif kind == "unknown weights":
        torch.save({"state_dict": {"conv.weight": torch.ones(3)}}, path)
    elif kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])


CONTENTS = {
    "random bytes": b"\x80" + bytes(range(256)),
    "text": b"not a checkpoint",
    "git-lfs": POINTER,
    "web page": b"<!DOCTYPE html><html><head><title>File</title></head><body></body></html>",
}
KINDS = ("truncated safetensors", "truncated zip", "gigantic safetensors", "gigantic tensor", "no dictionary")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", [*KINDS, "no weights", "unknown weights", *CONTENTS, "missing"])
def test_damaged_files_are_named(kind, suffix, tmp_path):
    path = tmp_path / f"c{suffix}"
    damaged(kind, path)
    words = (path.name, kind) if kind in ("git-lfs", "web page") else (path.name,)
    refused("convert", path, tmp_path / "out", words=words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    refused("convert", GOLDEN / "ldm_vae.weights.safetensors", tmp_path / "notes", words=("exists",))
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
