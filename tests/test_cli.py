"""The command line: an error is one sentence with exit code 2, and nothing half-written is left behind."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.cli import done, refused, sfd
from helpers.random_model import random_model
from sfd.utils import files
from tiny import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture
def slow_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


def test_help_does_not_import_torch():
    code = "import sys\nfrom sfd.cli.main import main\n"
    code += "main(['--help'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_missing_data_folder_is_named(recipe, tmp_path):
    refused(sfd("train-texture", recipe, f"data.source={tmp_path / 'none'}", "--out", tmp_path / "o"), "none")


def test_strict_refuses_a_broken_image(recipe, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "data" / "good.png")
    (tmp_path / "data" / "bad.png").write_bytes((tmp_path / "data" / "good.png").read_bytes()[:50])
    refused(
        sfd("train-texture", recipe, f"data.source={tmp_path / 'data'}", "--strict", "--out", tmp_path / "o"), "bad.png"
    )


def test_a_stage_names_the_stage_that_it_needs(recipe, tmp_path):
    refused(sfd("train", recipe, "--out", tmp_path / "o"), "sfd train-texture")


def test_a_runs_folder_alone_continues_the_run_by_its_own_recipe(copied, recipe, tmp_path):
    out = copied("report.html", "samples")
    before = (out / "recipe.yaml").read_text()
    refused(sfd("report", recipe, "train.warmup=1", "--out", out, "--device", "cpu"), "folder alone")
    for command in ("prepare", "train", "report"):
        done(command, out, "--device", "cpu")
    assert (out / "report.html").exists() and (out / "recipe.yaml").read_text() == before
    done("train-texture", out, "--out", tmp_path / "another", "--device", "cpu")
    assert (tmp_path / "another" / "texture" / "model.safetensors").exists()


def test_a_recipe_needs_a_folder_to_write_to(recipe):
    refused(sfd("run", recipe), "--out")
    done("run", recipe, "--dry-run", "--device", "cpu")


def test_an_output_folder_that_cannot_be_created_is_refused(recipe, tmp_path):
    (tmp_path / "file").touch()
    refused(sfd("train-texture", recipe, "--out", tmp_path / "file" / "o"), "file")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--classes", "dsik"], "did you mean 'disk'"),
        (["--steps", "0"], "greater than 0"),
        (["--steps", "2"], "at least 3 are needed"),
        (["--seeds", "5-3"], "not a seed"),
        (["--solver", "hoin"], "no solver 'hoin'"),
        (["--solver", "dopri5", "options.rtl=1e-3"], "did you mean 'rtol'"),
        (["guidance={semantics: 2}"], "did you mean 'semantic'"),
        (["--guidance", "semantics=2"], "did you mean 'semantic'"),
        (["--guidance", "2,1.5"], "such as semantic=1.5,texture=2"),
        (["--guidance", "2", "interval=[0.9, 0.1]"], "interval"),
        (["--guiding-model", "nowhere"], "nowhere"),
        (["options=[1"], "not valid YAML"),
        (["budget=equal"], "budget"),
    ],
)
def test_wrong_sampling_options_write_no_samples(model_folder, tmp_path, options, word):
    refused(sfd("sample", model_folder, "--out", tmp_path / "o", "--device", "cpu", *options), word)
    assert not (tmp_path / "o" / "samples.json").exists()


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(sfd("sample", tmp_path, "--out", tmp_path / "o"), "model.json is missing")


@pytest.mark.parametrize(
    ("options", "labels", "seeds"),
    [
        (["--seeds", "0-1,7"], [2, 2, 2, 1, 1, 1], [0, 1, 7] * 2),
        (["--seeds", "5-7", "--in-turn"], [2, 1, 2], [5, 6, 7]),
    ],
)
def test_each_class_gets_every_seed_or_classes_alternate(model_folder, tmp_path, options, labels, seeds):
    done("sample", model_folder, "--classes", "star,1", *options, "--steps", "3", "--device", "cpu", "--out", tmp_path)
    record = files.read_json(tmp_path / "samples.json", "samples")
    assert (record["labels"], record["seeds"]) == (labels, seeds)
    assert len(list(tmp_path.glob("0*.png"))) == len(seeds) and (tmp_path / "grid.png").exists()


def test_compiling_samples_without_a_compiler_writes_nothing(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    sampling = ("sample", model_folder, "--seeds", "0", "--steps", "3", "--device", "cpu", "--out", tmp_path / "o")
    refused(sfd(*sampling, "compile=true"), "there is no C++ compiler")
    assert not (tmp_path / "o").exists()
    done(*sampling)


@pytest.mark.parametrize("field", ["sample.compile=true", "train.compile=true"])
def test_a_run_that_cannot_be_compiled_trains_nothing(field, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    run = ("run", recipe, field, "--out", tmp_path / "o", "--device", "cpu")
    refused(sfd(*run), "cannot be compiled here")
    assert not (tmp_path / "o").exists()
    done(*run, "--dry-run")  # another machine may have a compiler


def test_bf16_without_cpu_instructions_warns(model_folder, tmp_path, slow_bf16):
    options = ("precision=bf16", "--seeds", "0", "--steps", "3", "--device", "cpu", "--out", tmp_path)
    assert "no bf16 instructions" in done("sample", model_folder, *options)


def test_latents_of_another_tokenizer_are_refused(copied, recipe):
    longer = ("texture.train.steps=4", "--out", copied("training", "texture"), "--device", "cpu")
    done("train-texture", recipe, *longer)
    refused(sfd("train", recipe, *longer), "tokenizers.texture")


def test_an_encoder_trained_for_longer_than_the_recipe_says_is_refused(copied, recipe):
    folder = copied("samples", "metrics")
    out = ("--out", folder, "--device", "cpu")
    refused(sfd("report", recipe, "train.steps=9", *out), "steps = 6, not 9")
    for made in ("latents", "training"):
        shutil.rmtree(folder / made)
    done("train-texture", recipe, "texture.train.steps=4", *out)
    refused(sfd("prepare", recipe, *out), "a run of 4 steps, but 3")


def test_encoders_from_other_folders_are_used(finished, recipe, tmp_path):
    parts, options = finished.folder, ("--out", tmp_path / "o", "--device", "cpu")
    given = [f"texture={{name: autoencoder_kl, train: null, folder: '{parts.texture}'}}"]
    given += [f"semantic={{name: convnet, train: null, folder: '{parts.semantic}'}}"]
    done("run", recipe, *given, *options, "--dry-run")
    for command in ("train-semvae", "prepare"):
        done(command, recipe, *given, *options)
    manifest = files.read_json(tmp_path / "o" / "latents" / "manifest.json", "folder of latents")
    assert manifest["streams"]["texture"]["tokenizer"] == finished.texture.encoder.identity
    assert not (tmp_path / "o" / "texture").exists()


@pytest.mark.parametrize(
    ("command", "lost"),
    [
        ("train-texture", "texture/model.safetensors"),
        ("prepare", "latents/shard-00001.safetensors"),
        ("train", "model/model.json"),
        ("report", "samples/guided/000003.png"),
    ],
)
def test_a_deleted_result_is_made_again_by_its_stage(copied, recipe, command, lost):
    out = copied()
    before = (out / lost).read_bytes()
    (out / lost).unlink()
    done(command, recipe, "--out", out, "--device", "cpu")
    assert (out / lost).read_bytes() == before


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.stepz=3", "did you mean 'train.steps'"),
        ("transformer.heads=5", "width 32"),
        ("transformer.repa_block=9", "last block"),
        ("streams.texture.patch_size=2", "token grid"),
        ("latents.features=false", "latents.features"),
        ("data.image_size=40", "multiple of 16"),
        ("sample.solver=hoin", "no solver"),
        ("texture.name=convnet", "texture encoder is needed"),
        ("train.accumulate=3", "batch_size 8 does not divide"),
        ("data.classes=1000", "data.classes is 1000, but shapes has 10 classes"),
        ("sample.guidance_from=guiding_model evaluation.guiding_model=nowhere", "there is no model nowhere"),
    ],
)
def test_an_impossible_recipe_is_refused_before_anything_is_written(recipe, tmp_path, override, word):
    refused(sfd("run", recipe, *override.split(), "--out", tmp_path / "o", "--device", "cpu"), word)
    assert not (tmp_path / "o").exists()


def test_too_few_images_for_the_evaluator_are_found_before_training(recipe, tmp_path):
    for name, count in (("many", 40), ("few", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30)).save(tmp_path / "data" / name / f"{number}.png")
    refused(sfd("run", recipe, f"data={{source: '{tmp_path / 'data'}'}}", "--out", tmp_path / "o"), "few")
    assert not (tmp_path / "o" / "texture").exists()


def test_a_time_limit_that_ends_between_stages_stops_the_run(recipe, tmp_path):
    result = sfd("run", recipe, "--out", tmp_path / "o", "--device", "cpu", "--max-hours", 1e-9)
    assert result.exit_code == 75 and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_files_without_a_stage_record_are_refused(copied, recipe):
    out = copied()
    (out / "training" / "stage.json").unlink()
    refused(sfd("train", recipe, "--out", out, "--device", "cpu"), "training holds files, but no stage.json")


def test_a_dry_run_computes_nothing(recipe, tmp_path):
    command = ("run", recipe, "--out", tmp_path / "o", "--dry-run", "--device", "cpu")
    output = done(*command)
    assert "parameters" in output and "estimated time" in output and not (tmp_path / "o").exists()
    assert "; 10 classes" in output and "; classes are counted" in done(*command, f"data.source={tmp_path}")


def test_an_exported_model_is_half_the_size_and_has_a_card(finished, tmp_path):
    done("export", finished.folder.root, tmp_path / "half")
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", finished.folder.model)]
    assert sizes[0] < 0.6 * sizes[1] and (tmp_path / "half" / "samples.png").exists()
    card = (tmp_path / "half" / "README.md").read_text()
    assert "guided samples" in card and "| recall |" in card


def test_an_earlier_checkpoint_becomes_a_model_that_guides(finished, tmp_path):
    run, model = finished.folder.root, finished.folder.model
    done("export", run, tmp_path / "last", "--step", 6, "--dtype", "float32")
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "last", model)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    refused(sfd("export", run, tmp_path / "none", "--step", 5), "step 5", "4, 6")
    refused(sfd("export", model, tmp_path / "none", "--step", 6), "no recipe.yaml")
    done("export", run, tmp_path / "earlier", "--step", 4)
    command = ("sample", run, "--guiding-model", tmp_path / "earlier", "--seeds", 0, "--classes", "star")
    done(*command, "--out", tmp_path / "guided", "--device", "cpu")


def test_a_damaged_checkpoint_is_not_exported(finished, tmp_path):
    shutil.copytree(finished.folder.root, tmp_path / "run")
    path = tmp_path / "run/training/checkpoints/step-000000004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(sfd("export", tmp_path / "run", tmp_path / "out", "--step", 4), "checksum")
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed(recipe):
    assert "`tiny.yaml`" in done("recipes", recipe.parent)


def test_shapes_are_written_as_a_folder(tmp_path):
    done("shapes", tmp_path / "shapes", "--count", 20)
    assert len(list((tmp_path / "shapes").glob("*/*.png"))) == 20
