"""`sfd convert`: published weights in, samples, and the same weights out; nothing is lost, run or half-written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfd.cli.main import main
from sfd.convert import transformer as published
from sfd.encoders import open_texture
from sfd.generation.model import load_model
from sfd.models.compressor import load_compressor
from small_published import TRANSFORMER, random_transformer

GOLDEN = Path(__file__).parent / "golden"
# 4 texture channels, as the reference autoencoder has, and 3 semantic ones; patch 2.
SMALL = TRANSFORMER | {"in_channels": 7, "semantic_chans": 3, "patch_size": 2}


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


def state_of(config) -> dict[str, Tensor]:
    network = random_transformer(config, 0)
    return {name: t.detach() for name, t in published.to_published(network.state_dict(), network.config).items()}


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
    """As a training run of the published code leaves it."""
    ema = state_of(SMALL)
    wrapped = {f"module.{name}": tensor for name, tensor in ema.items()}
    path = tmp_path / "0400000.pt"
    torch.save({"model": {n: t + 1 for n, t in wrapped.items()}, "ema": wrapped, "opt": {}, "config": SMALL}, path)
    return path


@pytest.fixture
def needed(texture, statistics) -> tuple:
    return ("--texture", texture, "--statistics", statistics)


class TestTransformer:
    def test_from_a_published_checkpoint_to_samples_and_back(self, checkpoint, needed, tmp_path):
        model, classes = tmp_path / "model", tmp_path / "classes.txt"
        classes.write_text("ant\nbee\ncat\ndog\nelk\n")
        output = done("convert", checkpoint, model, *needed, "--classes", classes)
        assert (
            ": published transformer" in output
            and "left out, what else the file holds (3): config, model, opt" in output
        )
        done("sample", model, "--classes", "bee", "--seeds", "0-1", "--steps", "3", "--out", tmp_path / "samples")
        assert Image.open(tmp_path / "samples" / "000000.png").size == (8, 8)
        for name in ("back.safetensors", "back.pt"):
            done("convert", model, tmp_path / name)
        original = state_of(SMALL)
        assert same(load_file(tmp_path / "back.safetensors"), original)
        assert same(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], original)

    def test_what_the_model_knows(self, checkpoint, needed, tmp_path):
        done("convert", checkpoint, tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec["delta"] == 0.3 and model.classes == ("0", "1", "2", "3", "4")
        texture, semantic = model.composite.streams
        assert texture.mean == pytest.approx((-1, -1 / 3, 1 / 3, 1)) and semantic.std == pytest.approx((0.5, 1.25, 2))
        assert texture.tokenizer == model.texture.identity and semantic.weight == 2
        assert model.transformer.config.repa_block == 1  # from the checkpoint's configuration

    def test_the_weights_that_are_not_averaged(self, checkpoint, needed, tmp_path):
        state = state_of(SMALL)
        torch.save(
            {"ema": state, "model": {n: t if n in published.TABLES else t + 1 for n, t in state.items()}}, checkpoint
        )
        done("convert", checkpoint, tmp_path / "model", *needed, "--weights", "model", "--repa-block", 1)
        done("convert", tmp_path / "model", tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
        assert torch.equal(back["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + 1)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, needed, tmp_path):
        state = {name: tensor.to(dtype) for name, tensor in state_of(SMALL).items()}
        save_file(state, tmp_path / "half.safetensors")
        done("convert", tmp_path / "half.safetensors", tmp_path / "model", *needed)
        done("convert", tmp_path / "model", tmp_path / "back.safetensors")
        back = load_file(tmp_path / "back.safetensors")
        assert same({name: tensor.to(dtype) for name, tensor in back.items()}, state)

    def test_weights_that_are_not_finite(self, needed, tmp_path):
        state = state_of(SMALL)
        state["x_embedder.proj.bias"][0] = float("nan")
        save_file(state, tmp_path / "diverged.safetensors")
        words = ("x_embedder.proj.bias", "not finite")
        refused("convert", tmp_path / "diverged.safetensors", tmp_path / "model", *needed, words=words)

    def test_statistics_that_are_not_there(self, checkpoint, texture, tmp_path):
        missing = tmp_path / "latents_stats"
        words = ("there is no such file or folder", str(missing))
        refused("convert", checkpoint, tmp_path / "m", "--texture", texture, "--statistics", missing, words=words)

    def test_one_clock_and_safetensors(self, texture, tmp_path):
        config = SMALL | {"semfirst_delta_t": 0.0, "use_repa": False}
        save_file(state_of(config), tmp_path / "bare.safetensors")
        options = ("--texture", texture, "--statistics", "none", "--semantic-channels", 3, "--classes", 5)
        done("convert", tmp_path / "bare.safetensors", tmp_path / "model", *options)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.schedule.spec == {"name": "synchronous"} and model.composite["texture"].mean == ()

    def test_statistics_of_latents(self, texture, tmp_path):
        config = SMALL | {"in_channels": 8, "semantic_chans": 4}
        torch.save({"ema": state_of(config)}, tmp_path / "c.pt")
        shards = GOLDEN / "latent_shards"
        refused(
            *("convert", tmp_path / "c.pt", tmp_path / "model", "--texture", texture, "--statistics", shards),
            words=("texture latents have 8 channels", "have 4"),
        )

    def test_a_model_trained_here_and_back(self, finished, tmp_path):
        folder = finished.folder
        done("convert", folder.root, tmp_path / "published.safetensors")
        needed = ("--texture", folder.texture, "--statistics", folder.latents, "--classes", tmp_path / "classes.txt")
        original = load_model(folder.model, torch.device("cpu"))
        (tmp_path / "classes.txt").write_text("\n".join(original.classes))
        done("convert", tmp_path / "published.safetensors", tmp_path / "model", *needed)
        model = load_model(tmp_path / "model", torch.device("cpu"))
        assert model.composite == original.composite and model.schedule.spec == original.schedule.spec
        assert same(model.transformer.state_dict(), original.transformer.state_dict())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"--texture": None}, ("--texture",)),
            ({"--statistics": None}, ("--statistics", "none")),
            ({"--semantic-channels": 2}, ("7 channels", "4 of the texture encoder", "2 semantic")),
            ({"--classes": 7}, ("7 classes", "5 and the null class")),
            ({"--classes": 6}, ("label dropout",)),
            ({"--delta": 0.5}, ("--delta is 0.5", "0.3")),
            ({"--repa-block": 2}, ("repa_block = 1", "say 2")),
            ({"--repa-block": 9}, ("beyond the last block",)),
        ],
    )
    def test_contradictions(self, options, words, checkpoint, needed, tmp_path):
        given = dict(zip(needed[::2], needed[1::2], strict=True)) | options
        arguments = [a for option, value in given.items() if value is not None for a in (option, value)]
        refused("convert", checkpoint, tmp_path / "model", *arguments, words=words)
        assert not (tmp_path / "model").exists()

    def test_a_configuration_that_is_not_the_tensors(self, checkpoint, needed, tmp_path):
        torch.save({"ema": state_of(SMALL), "config": SMALL | {"depth": 3}}, checkpoint)
        refused("convert", checkpoint, tmp_path / "model", *needed, words=("depth = 3", "say 2"))

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("blocks.1.norm1.weight", None, "missing: blocks.1.norm1.weight"),
            ("blocks.1.norm3.weight", torch.ones(32), "unexpected: blocks.1.norm3.weight"),
            ("blocks.1.norm1.weight", torch.ones(31), "misshapen: blocks.1.norm1.weight"),
            ("x_embedder.proj.weight", torch.ones(3), "published transformer"),
            ("pos_embed", torch.ones(1), "published transformer"),
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


class TestSemVAE:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        path = tmp_path / "semvae.pt"
        state = load_file(GOLDEN / "semvae.weights.safetensors")
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"step": 3}}, path)
        return path

    def test_there_and_back(self, source, tmp_path):
        output = done("convert", source, tmp_path / "part", "--heads", 4)
        assert "optimizer_state_dict" in output
        features, mean = (load_file(GOLDEN / "semvae.io.safetensors")[name] for name in ("features", "mean"))
        ours = load_compressor(tmp_path / "part").encode(features.transpose(1, 2).unflatten(2, (4, 4)))
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-5)
        done("convert", tmp_path / "part", tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)["model_state_dict"]
        assert same(back, load_file(GOLDEN / "semvae.weights.safetensors"))

    def test_heads_that_do_not_divide_the_width(self, source, tmp_path):
        refused("convert", source, tmp_path / "part", words=("width 32 does not divide into 6 heads",))


class TestAutoencoder:
    def test_diffusers_loads_it(self, texture):
        from diffusers import AutoencoderKL

        network, information = AutoencoderKL.from_pretrained(texture, output_loading_info=True)
        assert not any(information.values())
        io = load_file(GOLDEN / "ldm_vae.io.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(network.encode(io["images"]).latent_dist.mean, io["mean"], rtol=0, atol=1e-5)
        assert open_texture(str(texture)).channels == 4

    def test_there_and_back_without_what_training_needs(self, texture, tmp_path):
        state = load_file(GOLDEN / "ldm_vae.weights.safetensors")
        extra = {name: torch.ones(2) for name in ("loss.logvar", "foundation_model.norm.bias", "linear_proj.weight")}
        torch.save({"state_dict": state | extra, "epoch": 49}, tmp_path / "vae.ckpt")
        output = done("convert", tmp_path / "vae.ckpt", tmp_path / "vae")
        assert "(3): foundation_model.norm.bias, linear_proj.weight, loss.logvar" in output and "epoch" in output
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / "vae" / name).read_bytes() == (texture / name).read_bytes()
        done("convert", tmp_path / "vae", tmp_path / "back.ckpt")
        assert same(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], state)

    def test_one_that_the_format_cannot_hold(self, tmp_path):
        from small_published import save_kl

        save_kl(tmp_path / "kl")
        refused("convert", tmp_path / "kl", tmp_path / "back.ckpt", words=("norm_num_groups = 4", "implies 32"))


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("way", ["zip", "older", "plain pickle"])
def test_code_in_a_pickle_does_not_run(way, needed, tmp_path):
    path, trace = tmp_path / "c.pt", tmp_path / "it ran"
    values = {"ema": state_of(SMALL), "config": Code(trace)}
    if way == "plain pickle":
        path.write_bytes(pickle.dumps({"config": Code(trace)}))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=way == "zip")
    refused("convert", path, tmp_path / "model", *needed, words=("c.pt", "nothing of it was run"))
    assert not trace.exists() and not (tmp_path / "model").exists()


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
    elif kind == "random bytes":
        path.write_bytes(b"\x80" + bytes(range(256)))
    elif kind == "no dictionary":
        torch.save(torch.ones(3), path)
    elif kind == "no weights":
        torch.save({"epoch": 3, "best": 0.5}, path)
    elif kind == "unknown weights":
        torch.save({"state_dict": {"conv.weight": torch.ones(3)}}, path)
    elif kind == "text":
        path.write_text("not a checkpoint")


KINDS = ("truncated safetensors", "truncated zip", "gigantic safetensors", "gigantic tensor", "random bytes")
KINDS += ("no dictionary", "no weights", "unknown weights", "text", "missing")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_named(kind, needed, tmp_path):
    damaged(kind, tmp_path / "c.pt")
    refused("convert", tmp_path / "c.pt", tmp_path / "out", *needed, words=("c.pt",))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


class TestPlace:
    def test_only_its_like_is_replaced(self, texture, checkpoint, needed, tmp_path):
        ldm = GOLDEN / "ldm_vae.weights.safetensors"
        done("convert", ldm, tmp_path / "vae")
        done("convert", ldm, tmp_path / "vae")  # an autoencoder for an autoencoder
        refused("convert", checkpoint, tmp_path / "vae", *needed, words=("vae exists", "in diffusers' format"))
        refused("convert", texture, checkpoint, words=("0400000.pt exists", "(published transformer)"))

    def test_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "thesis.txt").write_text("years of work")
        refused("convert", GOLDEN / "ldm_vae.weights.safetensors", tmp_path / "notes", words=("something else",))
        assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"

    def test_options_that_do_nothing(self, texture, tmp_path):
        refused(
            "convert",
            texture,
            tmp_path / "x.pt",
            "--delta",
            0.3,
            "--heads",
            4,
            words=("--delta, --heads does nothing",),
        )

    def test_a_file_name_that_says_no_format(self, texture, tmp_path):
        refused("convert", texture, tmp_path / "back.bin", words=("back.bin should end in .safetensors",))

    def test_a_part_without_a_published_format(self, finished, tmp_path):
        refused(
            "convert", finished.folder.root / "texture", tmp_path / "x.pt", words=("autoencoder_kl", "no published")
        )
