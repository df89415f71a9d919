"""The pipeline for diffusers: its images are those of `Model.sample`, and it does what users of diffusers expect."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sfd
from helpers.hub import COMMIT, hub
from helpers.random_model import CLASSES, COMPOSITE, random_model
from sfd.cli.main import main
from sfd.diffusers import SFDPipeline, SFDScheduler, from_model, to_model
from sfd.encoders import kl
from sfd.utils.errors import SFDError

__all__ = ["hub"]

ROOT = Path(__file__).parent.parent
SMALL_KL = kl.Config(
    latent_channels=2, block_out_channels=(8,), layers_per_block=1, down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",), mid_block_add_attention=False, norm_num_groups=4,
)  # fmt: skip


def quiet(pipeline: SFDPipeline) -> SFDPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def model():
    return random_model(0, network={"depth": 2, "guide_block": 1})


@pytest.fixture
def pipeline(model):
    return quiet(from_model(model))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The shipped model in the format of diffusers."""
    folder = tmp_path_factory.mktemp("exported") / "shapes"
    arguments = ["export", str(ROOT / "models/shapes"), str(folder), "--format", "diffusers"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def test_the_shipped_model_gives_the_images_of_sfd_sample(exported):
    shapes, pipeline = sfd.load("shapes", device="cpu"), quiet(SFDPipeline.from_pretrained(exported))
    how = {"generator": seeded(3, 4), "num_inference_steps": 25, "guidance_scale": 2.0}
    latents = pipeline(["star", "heart"], **how, output_type="latent").images
    expected = shapes.sample(["star", "heart"], seeds=[3, 4], steps=25, guidance=2.0, output="latent")
    assert (latents - expected).abs().max() < 1e-4
    images = pipeline(["star", "heart"], **how | {"generator": seeded(3, 4)}).images
    for image, wanted in zip(images, shapes.decode(expected), strict=True):
        assert np.abs(np.asarray(image, np.int16) - wanted).max() <= 1


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 1.0},
        {"guidance": {"semantic": 1.9, "texture": 1.3}},
        {"guidance": 1.7, "interval": {"texture": (0.2, 0.7)}},
        {"guidance": 1.7, "guidance_from": "inside"},
    ],
    ids=str,
)
def test_steps_and_guidance_are_those_of_the_library(model, pipeline, solver, settings):
    pipeline.scheduler = SFDScheduler.from_config(pipeline.scheduler.config, solver=solver, shift=0.7)
    given = {"guidance": "guidance_scale", "interval": "guidance_interval", "guidance_from": "guidance_from"}
    arguments = {given[name]: value for name, value in settings.items()}
    latents = pipeline(
        ["ring", "star"], generator=seeded(0, 1), num_inference_steps=9, output_type="latent", **arguments
    ).images
    expected = model.sample(
        ["ring", "star"], seeds=[0, 1], steps=9, solver=solver, shift=0.7, output="latent", **settings
    )
    assert (latents - expected).abs().max() < 1e-5


def test_image_k_depends_on_seed_k_alone(pipeline):
    both = pipeline(["ring", "star"], generator=seeded(5, 6), output_type="latent").images
    alone = pipeline("star", generator=seeded(6)[0], output_type="latent").images
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_a_generator_goes_on(pipeline):
    generator = seeded(5)[0]
    first, second = (pipeline.prepare_latents(2, generator) for _ in range(2))
    assert torch.equal(first[:1], sfd.initial_noise([5], COMPOSITE))
    rows = torch.cat([first, second])
    assert len(rows.unique(dim=0)) == 4
    assert torch.equal(first, pipeline.prepare_latents(2, seeded(5)[0]))


def test_without_a_generator_torch_decides(pipeline):
    torch.manual_seed(1)
    first = pipeline.prepare_latents(2)
    torch.manual_seed(1)
    assert torch.equal(first, pipeline.prepare_latents(2))


def test_outputs_agree(pipeline):
    noise = sfd.initial_noise([0, 1], COMPOSITE)

    def run(kind: str):
        return pipeline(["ring", 2], latents=noise, num_inference_steps=4, output_type=kind, return_dict=False)[0]

    array = run("np")
    assert array.shape == (2, 4, 4, 3) and array.dtype == np.float32
    assert np.allclose(run("pt").permute(0, 2, 3, 1).numpy(), array)
    assert all(np.abs(np.asarray(image) / 255 - a).max() < 1 / 255 for image, a in zip(run("pil"), array, strict=True))
    assert np.allclose(pipeline.decode_latents(run("latent"), "np"), array)


def test_labels_may_be_nested_repeated_or_absent(pipeline):
    def labels(given, count=1, generator=None):
        return pipeline._labels(given, count, generator, None)

    assert labels([["ring"], [2]]) == labels(torch.tensor([[1], [2]])) == [1, 2]
    assert labels("ring", count=2) == labels("ring", generator=seeded(0, 1)) == [1, 1]
    assert labels(None) == [len(CLASSES)]


def test_a_callback_sees_steps_and_changes_them(pipeline):
    seen = []

    def shifted(pipe, step, u, tensors):
        seen.append((step, float(u)))
        return {"latents": tensors["latents"] + (1 if step == 3 else 0)}

    plain = pipeline("ring", generator=seeded(0), num_inference_steps=8, output_type="latent").images
    changed = pipeline(
        "ring", generator=seeded(0), num_inference_steps=8, output_type="latent", callback_on_step_end=shifted
    ).images
    assert [step for step, _ in seen] == list(range(pipeline.num_timesteps)) == list(range(8))
    assert (changed - plain).abs().mean() > 0.3  # a multistep method must not correct the change away


def test_a_callback_changes_guidance(model, pipeline):
    def off(pipe, step, u, tensors):
        pipe._guidance_scale = 1.0
        return tensors

    noise = sfd.initial_noise([0], COMPOSITE)
    pipeline("ring", latents=noise, num_inference_steps=4, guidance_scale=3.0, callback_on_step_end=off)
    assert pipeline.guidance_scale == 1.0


def test_each_smooth_interval_takes_a_step(pipeline, caplog):
    """Users of diffusers ask for 1 or 2 steps; the schedule's knots need 3."""
    images = [pipeline("ring", generator=seeded(0), num_inference_steps=n, output_type="np").images for n in (2, 3)]
    assert (images[0] == images[1]).all() and "3 steps are taken instead of 2" in caplog.text


REFUSED = {
    "class": ({"class_labels": "rign"}, "ring"),
    "number": ({"class_labels": 7}, "7"),
    "count": ({"class_labels": ["ring"] * 3, "generator": seeded(0, 1)}, "3 images"),
    "latents": ({"latents": torch.zeros(1, 3)}, "(1, 20)"),
    "output": ({"output_type": "jpg"}, "pil"),
    "steps": ({"num_inference_steps": 0}, "greater than 0"),
    "stream": ({"guidance_scale": {"textur": 2.0}}, "texture"),
    "source": ({"guidance_scale": 2.0, "guidance_from": "guiding_model"}, "null_class"),
    "tensor": ({"callback_on_step_end_tensor_inputs": ["x"]}, "latents"),
}


@pytest.mark.parametrize(("given", "hint"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused(pipeline, given, hint):
    with pytest.raises(SFDError) as error:
        pipeline(**given)
    assert hint in str(error.value)


def test_half_precision_is_that_of_sample(exported):
    shapes, pipeline = sfd.load("shapes", device="cpu"), SFDPipeline.from_pretrained(exported, dtype=torch.bfloat16)
    how = {"generator": seeded(0), "num_inference_steps": 5, "output_type": "latent"}
    latents = quiet(pipeline)("star", **how).images
    expected = shapes.sample("star", seeds=0, steps=5, precision="bf16", output="latent")
    assert pipeline.dtype == torch.bfloat16 and latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.005
    pipeline = quiet(SFDPipeline.from_pretrained(exported).to(torch.float16))
    assert (pipeline("star", **how | {"generator": seeded(0)}).images - expected).abs().mean() < 0.1


def test_offloading_changes_nothing(exported):
    def run(pipeline):
        return pipeline("star", generator=seeded(0), num_inference_steps=4, output_type="np").images

    expected = run(quiet(SFDPipeline.from_pretrained(exported)))
    pipeline = quiet(SFDPipeline.from_pretrained(exported))
    pipeline.enable_model_cpu_offload(device="cpu")
    assert np.allclose(run(pipeline), expected, atol=1e-5)
    assert all(hasattr(network, "_hf_hook") for network in (pipeline.transformer, pipeline.vae))


def test_loading_runs_no_file_of_the_folder(exported, tmp_path):
    pipeline = SFDPipeline.from_pretrained(exported)
    pipeline.save_pretrained(tmp_path)
    scripts = sorted(tmp_path.rglob("*.py"))
    assert [path.relative_to(tmp_path).as_posix() for path in scripts] == [
        "pipeline.py", "scheduler/sfd_scheduler.py", "transformer/sfd_transformer.py", "vae/sfd_autoencoder.py"
    ]  # fmt: skip
    for script in scripts:
        script.write_text("raise AssertionError('run')")
    assert SFDPipeline.from_pretrained(tmp_path).config["identity"] == pipeline.config["identity"]


TRUSTING = """
import sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline

source, copy, hub_name = sys.argv[1:]
assert not any(name.partition(".")[0] == "sfd" for name in sys.modules)
for folder in (source, copy, hub_name):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline("star", generator=torch.Generator().manual_seed(0), num_inference_steps=4).images
    assert type(pipeline).__module__ == "sfd.diffusers.pipeline" and images[0].size == (32, 32)
    pipeline.save_pretrained(copy)
"""
WITHOUT_SFD = """
import sys
from diffusers import DiffusionPipeline


class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "sfd":
            raise ModuleNotFoundError("No module named 'sfd'", name="sfd")


sys.meta_path.insert(0, Absent)
DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.slow
def test_diffusers_loads_it_in_a_process_that_knows_nothing_of_sfd(exported, tmp_path):
    def run(code: str, *arguments: Path | str):
        env = {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True)

    cached = tmp_path / "home/hub/models--someone--shapes"  # as a download leaves it
    shutil.copytree(exported, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    result = run(TRUSTING, exported, tmp_path / "copy", "someone/shapes")
    assert result.returncode == 0, result.stderr
    result = run(WITHOUT_SFD, exported)
    assert result.returncode == 1 and "pip install" in result.stderr.splitlines()[-1]


def test_export_and_back_keeps_the_model(exported, tmp_path):
    result = CliRunner().invoke(main, ["export", str(exported), str(tmp_path / "back")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    shapes, back = sfd.load("shapes", device="cpu"), sfd.load(tmp_path / "back", device="cpu")
    assert back.identity == shapes.identity and back.classes == shapes.classes and back.history == shapes.history
    assert (tmp_path / "back/model.safetensors").read_bytes() == (ROOT / "models/shapes/model.safetensors").read_bytes()
    assert back.compressor.identity == shapes.compressor.identity  # it can still encode
    assert "trust_remote_code=True" in (exported / "README.md").read_text()


def test_a_distilled_model_samples_in_its_numbers_of_steps(tmp_path):
    arguments = ["export", str(ROOT / "models/shapes-few"), str(tmp_path / "few"), "--format", "diffusers"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    few, pipeline = sfd.load("shapes-few", device="cpu"), quiet(SFDPipeline.from_pretrained(tmp_path / "few"))
    for steps in (None, 1, 2, 4, 8):
        how = {"generator": seeded(3, 4), "num_inference_steps": steps, "output_type": "latent"}
        expected = few.sample(["star", "heart"], seeds=[3, 4], output="latent", **{"steps": steps} if steps else {})
        assert (pipeline(["star", "heart"], **how).images - expected).abs().max() < 1e-4
        assert pipeline.num_timesteps == (steps or 4)
    for wrong in ({"num_inference_steps": 3}, {"guidance_scale": 2.0}):
        with pytest.raises(SFDError, match="distilled"):
            pipeline("star", **wrong)
    with pytest.raises(SFDError, match="flow_map"):
        SFDScheduler.from_config(pipeline.scheduler.config, solver="heun")
    assert to_model(pipeline).identity == few.identity


def test_a_published_autoencoder_is_that_of_diffusers(model, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    with_kl = random_model(0)
    with_kl.texture = kl.build(SMALL_KL).eval()
    pipeline = quiet(from_model(with_kl))
    pipeline.save_pretrained(tmp_path)
    found = SFDPipeline.from_pretrained(tmp_path)
    assert type(found.vae) is AutoencoderKL and not list((tmp_path / "vae").glob("*.py"))
    back, seeds = to_model(found), [0, 1]
    assert back.texture.config == SMALL_KL
    expected = with_kl.sample(seeds=seeds, steps=4, output="array").astype(np.int16)
    assert np.abs(back.sample(seeds=seeds, steps=4, output="array") - expected).max() <= 1


def test_a_pipeline_comes_back_from_the_hub(pipeline, hub):
    from huggingface_hub import HfApi

    folder = hub.parent / "saved"
    pipeline.save_pretrained(folder)
    HfApi().upload_folder(repo_id="someone/pipeline", folder_path=folder)
    found = quiet(SFDPipeline.from_pretrained("someone/pipeline"))
    how = {"num_inference_steps": 4, "output_type": "latent"}
    expected = pipeline("ring", generator=seeded(0), **how).images
    assert torch.allclose(found("ring", generator=seeded(0), **how).images, expected, atol=1e-5)


def test_the_scheduler_stops_at_knots_and_at_the_end(pipeline):
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(7)
    assert set(np.float32(scheduler.schedule.knots)) <= set(scheduler.timesteps.numpy())
    clean, noise = torch.ones(2, COMPOSITE.size), torch.zeros(2, COMPOSITE.size)
    mixed = COMPOSITE.unpack(scheduler.add_noise(clean, noise, torch.tensor([0.0, 0.5])))
    times = scheduler.schedule.at(torch.tensor(0.5)).time
    assert all((mixed[s][0] == 0).all() for s in COMPOSITE.names)
    assert all(torch.allclose(mixed[s][1], t) for s, t in zip(COMPOSITE.names, times, strict=True))
    for u in scheduler.timesteps:
        scheduler.step(noise, u, noise)
    with pytest.raises(SFDError, match="set_timesteps"):
        scheduler.step(noise, 1.0, noise)
