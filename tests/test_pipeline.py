"""Every stage, on real parts, at a size that takes seconds."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sfd.cli.main import main
from sfd.data.folder import write_folder
from sfd.data.shapes import ShapesSource
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import read_metrics
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import read_images, write_samples
from sfd.generation.model import load_model
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.utils import files
from sfd.utils.errors import SFDError
from tiny import RECIPE, write_recipe

CPU = torch.device("cpu")


def weights(run):
    return files.read_tensors(run / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_ends_with_a_report(finished):
    page = finished.folder.report.read_text()
    assert "tiny" in page and "Fréchet distance" in page


def test_previews_are_written(finished):
    names = sorted(p.name for p in (finished.folder.training / "previews").iterdir())
    assert names == ["real.png", "step-000000003.png", "step-000000006.png"]


def test_the_same_command_does_nothing_again(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.folder.root.rglob("*.safetensors")}
    again = Pipeline(finished.recipe, finished.folder.root, CPU)
    again.make_model()
    assert before == {p: p.stat().st_mtime_ns for p in finished.folder.root.rglob("*.safetensors")}


def test_the_same_recipe_gives_the_same_bytes(finished, tmp_path):
    other = Pipeline(finished.recipe, tmp_path, CPU)
    other.make_model()
    assert same(weights(tmp_path), weights(finished.folder.root))


def test_a_killed_run_goes_on_to_the_same_bytes(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("training", "model", "samples", "metrics"))
    command = [sys.executable, "-m", "sfd", "train", str(write_recipe(tmp_path)), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((out / "training" / "checkpoints").glob("step-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert (
        process.wait() == -signal.SIGKILL
        and files.read_json(out / "training" / "stage.json", "stage")["finished"] is None
    )
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert same(weights(out), weights(finished.folder.root))


def test_another_recipe_in_the_same_folder_is_refused(finished):
    other = load_recipe(finished.folder.recipe, ["loss.cosine=0.5"])
    with pytest.raises(SFDError, match=r"loss\.cosine was 1\.0 before and is 0\.5 now"):
        Pipeline(other, finished.folder.root, CPU).transformer.make()


def test_a_stage_names_what_it_needs_first(tmp_path):
    pipeline = Pipeline(load_recipe(write_recipe(tmp_path)), tmp_path / "out", CPU)
    with pytest.raises(SFDError, match="sfd train-texture"):
        pipeline.transformer.make()


def test_image_k_depends_on_seed_k_alone(finished):
    seeds, labels = list(range(7)), [0, 1, 2, 3, 4, 5, 6]
    settings = SamplingConfig(steps=4, guidance=1.5)
    whole = torch.cat([g.latents for g in finished.model.sample_batches(labels, seeds, settings)])
    odd = settings.model_copy(update={"batch_size": 3})
    parts = torch.cat([g.latents for g in finished.model.sample_batches(labels, seeds, odd)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_resumed_folder_of_samples_is_the_same(finished, tmp_path):
    settings = SamplingConfig(steps=3)
    write_samples(tmp_path / "a", finished.model, [0, 1, 2], [5, 6, 7], settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "000001.png").unlink()
    write_samples(tmp_path / "b", finished.model, [0, 1, 2], [5, 6, 7], settings)
    assert np.array_equal(read_images(tmp_path / "a", range(3)), read_images(tmp_path / "b", range(3)))


def test_samples_made_otherwise_are_not_mixed(finished, tmp_path):
    write_samples(tmp_path / "a", finished.model, [0], [5], SamplingConfig(steps=3))
    with pytest.raises(SFDError, match="steps = 3, but this command has 4"):
        write_samples(tmp_path / "a", finished.model, [0], [5], SamplingConfig(steps=4))


def test_autoguidance_by_another_model(finished):
    settings = SamplingConfig(steps=3, guidance={"semantic": 1.9, "texture": 1.3}, guidance_from="guiding_model")
    guided = next(finished.model.sample_batches([1], [0], settings, guiding=finished.model))
    plain = next(finished.model.sample_batches([1], [0], SamplingConfig(steps=3)))
    torch.testing.assert_close(guided.latents, plain.latents)  # guided by itself: unchanged


WEAK = "sample.guidance_from=guiding_model"


def without_classifier(finished, out, *overrides):
    shutil.copytree(
        finished.folder.root, out, ignore=shutil.ignore_patterns("evaluator", "samples", "metrics", "*.html")
    )
    recipe = load_recipe(finished.folder.recipe, ["evaluation.classifier=null", *overrides])
    return Pipeline(recipe, out, CPU)


def test_without_a_classifier_a_run_ends_with_samples_and_how_to_evaluate_them(finished, tmp_path):
    pipeline = without_classifier(finished, tmp_path / "out")
    pipeline.make_model()
    pipeline.report()
    page = pipeline.folder.report.read_text()
    assert "sfd evaluate" in page and "Fréchet distance" not in page
    assert len(list((pipeline.folder.samples / "guided").glob("0*.png"))) == 20
    with pytest.raises(SFDError, match=r"has no evaluation\.classifier"):
        _ = pipeline.evaluator.extractor


def test_a_recipe_names_the_guiding_model_of_its_samples(finished, tmp_path):
    pipeline = without_classifier(finished, tmp_path / "out", WEAK, f"evaluation.guiding_model={finished.folder.root}")
    pipeline.make_model()
    pipeline.report()
    record = files.read_json(pipeline.folder.samples / "guided" / "samples.json", "samples")
    assert record["guiding"] == finished.model.identity
    guided, unguided = (read_images(pipeline.folder.samples / name, range(4)) for name in ("guided", "unguided"))
    assert np.abs(guided.astype(int) - unguided).max() <= 1  # guided by itself: unchanged, but for rounding


def test_a_missing_guiding_model_is_found_before_training(finished, tmp_path):
    recipe = load_recipe(finished.folder.recipe, [WEAK, "evaluation.guiding_model=nowhere"])
    with pytest.raises(SFDError, match="there is no model nowhere"):
        Pipeline(recipe, tmp_path, CPU).make_model()


def test_a_batch_that_does_not_divide_is_found_before_anything_is_trained(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["train.accumulate=3"])
    with pytest.raises(SFDError, match="batch_size 8 does not divide into 1 ranks × 3 micro-batches"):
        Pipeline(recipe, tmp_path / "out", CPU).make_model()
    assert not (tmp_path / "out").exists()


def test_data_of_another_number_of_classes_are_refused(finished, tmp_path):
    recipe = load_recipe(finished.folder.recipe, ["data.classes=1000"])
    with pytest.raises(SFDError, match=r"data\.classes is 1000, but shapes has 10 classes"):
        Pipeline(recipe, tmp_path, CPU).texture.make()


def test_samples_are_evaluated_by_a_run_as_a_folder_and_packed(finished, tmp_path):
    guided, run = finished.folder.samples / "guided", finished.folder.root
    assert CliRunner().invoke(main, ["pack", str(guided), str(tmp_path / "guided.npz")]).exit_code == 0
    for samples in (guided, tmp_path / "guided.npz"):
        result = CliRunner().invoke(
            main, ["evaluate", str(samples), "--run", str(run), "--out", str(tmp_path / "out.json"), "--device", "cpu"]
        )
        assert "class accuracy" in result.output and "20, balanced" in result.output
        recorded = read_metrics(finished.folder.metrics / "guided-samples.json")
        assert read_metrics(tmp_path / "out.json") == recorded.model_copy(update={"name": samples.name})


def test_a_model_in_half_precision_is_still_itself(finished, tmp_path):
    finished.model.save(tmp_path / "half", torch.float16)
    assert load_model(tmp_path / "half", CPU).identity == finished.model.identity


def test_a_model_with_another_texture_encoder_is_refused(finished, tmp_path):
    shutil.copytree(finished.folder.model, tmp_path / "model")
    other = Pipeline(load_recipe(finished.folder.recipe, ["seed=1"]), tmp_path / "other", CPU)
    other.texture.make()
    other.texture.encoder.save(tmp_path / "model" / "texture")
    with pytest.raises(SFDError, match="made by tokenizer"):
        load_model(tmp_path / "model", CPU)


def test_weights_of_another_model_are_refused(finished, tmp_path):
    shutil.copytree(finished.folder.model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    files.write_tensors(path, {name: t + 1 for name, t in files.read_tensors(path).items()})
    with pytest.raises(SFDError, match="is not the file"):
        load_model(tmp_path / "model", CPU)


def test_latents_read_back_what_was_encoded(finished):
    latents, source = LatentSet(finished.folder.latents), finished.images.training
    numbers = np.array([3, 77, 51])
    from sfd.data.images import to_tensor

    expected = finished.texture.encoder.encode(to_tensor(source.load(numbers)).flip(-1))
    torch.testing.assert_close(latents.read("texture", numbers, np.ones(3, bool)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["compressor={name: pca, channels: 4}"],
        ["streams={texture: {}, semantic: null}", "schedule={name: synchronous}", "loss.repa=0"],
        ["schedule={name: sequential}", "transformer.checkpointing=true"],
        ["schedule={name: synchronous}", "transformer.clocks=one"],
    ],
    ids=["pca", "texture alone", "sequential", "one clock"],
)
def test_variants_of_the_method_run(finished, tmp_path, overrides):
    for part in ("texture", "semantic"):
        shutil.copytree(finished.folder.root / part, tmp_path / part)
    pipeline = Pipeline(load_recipe(finished.folder.recipe, overrides), tmp_path, CPU)
    pipeline.compressor.make()
    pipeline.latents.make()
    pipeline.transformer.make()
    images = next(pipeline.model.sample_batches([0], [0], SamplingConfig(steps=3))).images
    assert images.shape == (1, 32, 32, 3)


def test_a_folder_without_classes_trains_an_unconditional_model(tmp_path):
    write_folder(ShapesSource(40, 0), tmp_path / "classes")
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted((tmp_path / "classes").rglob("*.png"))):
        path.rename(tmp_path / "flat" / f"{number}.png")
    recipe = load_recipe(
        write_recipe(tmp_path, RECIPE),
        [f"data={{source: '{tmp_path / 'flat'}', holdout: 0.5}}", "evaluation.samples_per_class=8"],
    )
    pipeline = Pipeline(recipe, tmp_path / "out", CPU)
    pipeline.make_model()
    pipeline.report()
    assert pipeline.model.classes == () and pipeline.folder.report.exists()
