"""What a user sees: every mistake gives one sentence and exit code 2, and leaves nothing half-written behind."""

import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sfd.cli.main import main
from sfd.utils import files
from tiny import write_recipe


def sfd(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, *words):
    """Check for exit code 2 and one line that says all the words."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in lines[0]


def interruptible(command):
    """Start a command that hears SIGINT, also where the tests themselves run in the background and ignore it."""
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def picture(path, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def test_help_does_not_wait_for_pytorch():
    code = (
        "import sys; from sfd.cli.main import main; main(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False")


def test_a_missing_folder(recipe, tmp_path):
    refused(sfd("train-texture", recipe, f"data.source={tmp_path / 'none'}", "--out", tmp_path / "o"), "none")


def test_an_empty_folder(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(sfd("train-texture", recipe, f"data.source={tmp_path / 'empty'}", "--out", tmp_path / "o"), "empty")


def test_a_class_without_images(recipe, tmp_path):
    picture(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "data" / "b").mkdir()
    picture(tmp_path / "data" / "c" / "1.png")
    command = ("train-texture", recipe, f"data.source={tmp_path / 'data'}", "--out", tmp_path / "o")
    refused(sfd(*command, "--strict"), "'b'")
    refused(sfd(*command), "classes with fewer: 'a', 'c'")


def test_a_broken_image_under_strict(recipe, tmp_path):
    picture(tmp_path / "data" / "good.png")
    (tmp_path / "data" / "bad.png").write_bytes((tmp_path / "data" / "good.png").read_bytes()[:50])
    arguments = (f"data={{source: '{tmp_path / 'data'}', strict: true}}", "--out", tmp_path / "o")
    refused(sfd("train-texture", recipe, *arguments), "bad.png")


def test_a_misspelt_field(recipe, tmp_path):
    refused(sfd("run", recipe, "train.stepz=3", "--out", tmp_path / "o"), "did you mean 'train.steps'")
    assert not (tmp_path / "o").exists()


def test_a_stage_too_early(recipe, tmp_path):
    refused(sfd("train", recipe, "--out", tmp_path / "o"), "sfd train-texture")


def test_a_device_that_is_not_there(recipe, tmp_path):
    refused(sfd("train", recipe, "--out", tmp_path / "o", "--device", "abacus"), "abacus")


def test_a_folder_in_use(recipe, tmp_path):
    hold = "import sys, time; from pathlib import Path; from sfd.utils import files\n"
    hold += "with files.exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "o")], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        refused(sfd("train-texture", recipe, "--out", tmp_path / "o"), "in use")
    finally:
        process.kill()
        process.wait()


def test_a_folder_that_cannot_be_made(recipe, tmp_path):
    (tmp_path / "file").touch()
    refused(sfd("train-texture", recipe, "--out", tmp_path / "file" / "o"), "file")


def test_no_model(tmp_path):
    refused(sfd("sample", tmp_path, "--out", tmp_path / "o"), "model.json is missing")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--classes", "dsik"], "did you mean 'disk'"),
        (["--steps", "0"], "greater than 0"),
        (["--steps", "2"], "at least 3 are needed"),
        (["--seeds=-1"], "not a seed"),
        (["--seeds", "5-3"], "not a seed"),
        (["--solver", "hoin"], "no solver 'hoin'"),
        (["--solver", "dopri5", "options.rtl=1e-3"], "did you mean 'rtol'"),
        (["--guidance", "strong"], "strong"),
        (["guidance={semantics: 2}"], "did you mean 'semantic'"),
        (["--guidance=-1"], "at least 0"),
        (["--guidance", "2", "interval=[0.9, 0.1]"], "interval"),
        (["shift=0"], "shift"),
        (["--guiding-model", "nowhere"], "nowhere"),
        (["--weak", "nowhere"], "--guiding-model"),
        (["options=[1"], "not valid YAML"),
        (["batch_size=0"], "batch_size"),
    ],
)
def test_sampling_that_makes_no_sense(finished, tmp_path, options, word):
    refused(sfd("sample", finished.folder.model, "--out", tmp_path / "o", "--device", "cpu", *options), word)
    assert not (tmp_path / "o" / "samples.json").exists()


def test_sampling_writes_images_and_a_grid(finished, tmp_path):
    result = sfd(
        "sample", finished.folder.root, "--classes", "star,2", "--seeds", "0-1,7", "--steps", "3", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("0*.png"))) == 6
    record = files.read_json(tmp_path / "samples.json", "samples")
    assert (record["labels"], record["seeds"]) == ([4, 4, 4, 2, 2, 2], [0, 1, 7] * 2)


def test_the_same_seed_gives_the_same_image_in_any_company(finished, tmp_path):
    for name, seeds in (("a", "3"), ("b", "0-4")):
        sfd(
            "sample",
            finished.folder.root,
            "--classes",
            "star",
            "--seeds",
            seeds,
            "--steps",
            "3",
            "--out",
            tmp_path / name,
        )
    a, b = (np.asarray(Image.open(tmp_path / p), dtype=int) for p in ("a/000000.png", "b/000003.png"))
    assert abs(a - b).max() <= 1  # a last bit of the arithmetic may fall on the other side of a rounding


def test_latents_of_another_tokenizer(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("training"))
    longer = ("texture.train.steps=4", "--out", out, "--device", "cpu")
    assert sfd("train-texture", recipe, *longer).exit_code == 0
    refused(sfd("train", recipe, *longer), "tokenizers.texture")


def test_an_encoder_trained_for_longer_than_the_recipe_says(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    assert sfd("train-texture", recipe, "texture.train.steps=4", "--out", out, "--device", "cpu").exit_code == 0
    refused(sfd("prepare", recipe, "--out", out, "--device", "cpu"), "steps = 4, not 3")


def test_a_refused_command_leaves_the_recipe(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    before = (out / "recipe.yaml").read_text()
    refused(sfd("train", recipe, "loss.cosine=0.5", "--out", out, "--device", "cpu"), "loss.cosine")
    assert (out / "recipe.yaml").read_text() == before


def test_classes_in_turn_share_no_seed(finished, tmp_path):
    arguments = ("--classes", "star,2", "--seeds", "5-7", "--in-turn", "--steps", "3", "--device", "cpu")
    assert sfd("sample", finished.folder.root, *arguments, "--out", tmp_path).exit_code == 0
    record = files.read_json(tmp_path / "samples.json", "samples")
    star = record["classes"].index("star")
    assert record["labels"] == [star, 2, star] and record["seeds"] == [5, 6, 7]
    assert len(list(tmp_path.glob("0*.png"))) == 3


def test_a_lost_sample_is_made_again(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    lost = out / "samples" / "guided" / "000003.png"
    whole = lost.read_bytes()
    lost.unlink()
    assert sfd("report", recipe, "--out", out, "--device", "cpu").exit_code == 0
    assert lost.read_bytes() == whole


def test_encoders_from_elsewhere_are_used(finished, recipe, tmp_path):
    parts = finished.folder
    given = [
        f"{name}={{name: {kind}, train: null, folder: '{folder}'}}"
        for name, kind, folder in (
            ("texture", "autoencoder_kl", parts.texture),
            ("semantic", "convnet", parts.semantic),
        )
    ]
    assert sfd("run", recipe, *given, "--out", tmp_path / "o", "--dry-run", "--device", "cpu").exit_code == 0
    for command in ("train-semvae", "prepare"):
        result = sfd(command, recipe, *given, "--out", tmp_path / "o", "--device", "cpu")
        assert result.exit_code == 0, result.output
    manifest = files.read_json(tmp_path / "o" / "latents" / "manifest.json", "folder of latents")
    assert manifest["streams"]["texture"]["tokenizer"] == finished.texture.encoder.identity
    assert not (tmp_path / "o" / "texture").exists()


def test_metrics_are_not_written_over_a_folder(finished, tmp_path):
    samples = finished.folder.samples / "guided"
    refused(sfd("evaluate", samples, "--run", finished.folder.root, "--out", tmp_path), "is a folder")


def test_a_report_of_another_recipe_is_refused(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    refused(sfd("report", recipe, "train.steps=9", "--out", out, "--device", "cpu"), "steps = 6, not 9")


@pytest.mark.parametrize("lost", ["texture/model.safetensors", "latents/shard-00001.safetensors", "model/model.json"])
def test_a_lost_result_is_made_again_by_its_stage(finished, recipe, tmp_path, lost):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    whole = (out / lost).read_bytes()
    (out / lost).unlink()
    command = {"texture": "train-texture", "latents": "prepare", "model": "train"}[lost.split("/")[0]]
    assert sfd(command, recipe, "--out", out, "--device", "cpu").exit_code == 0
    assert (out / lost).read_bytes() == whole


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("transformer.heads=5", "width 32"),
        ("transformer.repa_block=9", "last block"),
        ("compressor.heads=5", "heads"),
        ("streams.texture.patch_size=2", "token grid"),
        ("latents.features=false", "latents.features"),
        ("streams={texture: {patch_size: 2}, semantic: {patch_size: 2}}", "grid of 2"),
        ("train.betas=[2.0, 0.9]", "betas"),
        ("data.image_size=40", "multiple of 16"),
        ("sample.solver=hoin", "no solver"),
        ("sample.steps=0", "greater than 0"),
        ("sample.guidance=-3", "at least 0"),
        ("texture.name=convnet", "texture encoder is needed"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_at_once(recipe, tmp_path, override, word):
    refused(sfd("run", recipe, override, "--out", tmp_path / "o"), word)
    assert not (tmp_path / "o").exists()


def test_a_recipe_with_an_interval_and_an_adaptive_solver_reaches_its_report(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("samples", "metrics"))
    sampling = "sample={solver: dopri5, guidance: 1.5, interval: [0.1, 0.9], options: {rtol: 1e-1}}"
    result = sfd("report", recipe, sampling, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_too_few_images_for_the_evaluator_are_found_at_once(recipe, tmp_path):
    for number in range(40):
        picture(tmp_path / "data" / "many" / f"{number}.png")
    for number in range(2):
        picture(tmp_path / "data" / "few" / f"{number}.png")
    refused(sfd("run", recipe, f"data={{source: '{tmp_path / 'data'}'}}", "--out", tmp_path / "o"), "few")
    assert not (tmp_path / "o" / "texture").exists()


def test_a_run_whose_time_is_over_leaves_with_its_own_code(recipe, tmp_path):
    command = ["train-texture", recipe, "--out", tmp_path / "o", "--device", "cpu"]
    stopped = sfd(*command, "texture.train.steps=1000000", "--max-hours", 2 / 3600)
    assert stopped.exit_code == 75 and "the time is over; run the same command to resume" in stopped.output
    assert (tmp_path / "o" / "texture" / "checkpoints").is_dir()


def test_a_time_that_is_over_between_stages_is_heard(recipe, tmp_path):
    result = sfd("run", recipe, "--out", tmp_path / "o", "--device", "cpu", "--max-hours", 1e-9)
    assert result.exit_code == 75 and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_an_exported_model_is_half_the_size(finished, tmp_path):
    assert sfd("export", finished.folder.root, tmp_path / "half").exit_code == 0
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", finished.folder.model)]
    assert sizes[0] < 0.6 * sizes[1]
    card = (tmp_path / "half" / "README.md").read_text()
    assert "guided samples" in card and "| recall |" in card and (tmp_path / "half" / "samples.png").exists()


def test_a_trajectory_is_drawn(finished, tmp_path):
    assert (
        sfd("trajectory", finished.folder.root, "--class", "star", "--out", tmp_path / "trajectory.png").exit_code == 0
    )
    assert Image.open(tmp_path / "trajectory.png").width > 500


def test_files_without_a_record_of_what_they_were_made_from_are_refused(finished, recipe, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out)
    (out / "training" / "stage.json").unlink()
    refused(sfd("train", recipe, "--out", out, "--device", "cpu"), "training holds files, but no stage.json")


def test_a_dry_run_computes_nothing(recipe, tmp_path):
    result = sfd("run", recipe, "--out", tmp_path / "o", "--dry-run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "parameters" in result.output and "estimated time" in result.output and not (tmp_path / "o").exists()


def test_a_rate_without_a_dry_run_is_refused(recipe, tmp_path):
    refused(sfd("run", recipe, "--out", tmp_path / "o", "--tflops", 400), "--dry-run")


def test_recipes_are_listed(recipe):
    result = sfd("recipes", recipe.parent)
    assert result.exit_code == 0 and "`tiny.yaml`" in result.output


def test_a_folder_without_recipes_is_refused(tmp_path):
    refused(sfd("recipes", tmp_path), "no recipe in")


def test_shapes_can_be_written_as_a_folder(tmp_path):
    assert sfd("shapes", tmp_path / "shapes", "--count", 20).exit_code == 0
    assert len(list((tmp_path / "shapes").glob("*/*.png"))) == 20


def test_ctrl_c_while_sampling_leaves_whole_images(finished, tmp_path):
    arguments = ["sample", str(finished.folder.root), "--seeds", "0-999", "batch_size=2", "--steps", "3"]
    command = [sys.executable, "-m", "sfd", *arguments, "--out", str(tmp_path / "o"), "--device", "cpu"]
    process = interruptible(command)
    while not (tmp_path / "o" / "000003.png").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(2)
    _, message = process.communicate()
    assert process.returncode == 130 and "run the same command to resume" in message
    for path in (tmp_path / "o").glob("*.png"):
        Image.open(path).load()
    assert not list((tmp_path / "o").glob(".*.partial"))


def test_ctrl_c_leaves_a_run_that_goes_on(recipe, tmp_path):
    command = [sys.executable, "-m", "sfd", "train-texture", str(recipe), "texture.train.steps=150"]
    command += ["--out", str(tmp_path / "o"), "--device", "cpu"]
    process = interruptible(command)
    while not (tmp_path / "o" / "texture" / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(2)
    _, message = process.communicate()
    assert process.returncode == 130 and "run the same command to resume" in message
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=True).returncode == 0
