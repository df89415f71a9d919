"""Every stage on real components, at a size that takes seconds."""

import html
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cli import done
from helpers.compare import same_tensors
from sfd.data.folder import write_folder
from sfd.data.shapes import ShapesSource
from sfd.data.shards import LatentSet
from sfd.evaluation.evaluate import read_metrics
from sfd.generation.config import SamplingConfig
from sfd.generation.folder import read_images
from sfd.generation.model import load_model
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.run.report_images import nearest
from sfd.utils import files
from sfd.utils.errors import SFDError
from tiny import write_recipe

CPU = torch.device("cpu")


def test_a_run_writes_previews_and_a_report(finished):
    page = finished.folder.report.read_text()
    assert "tiny" in page and "Fréchet distance" in page and "<iframe" in page
    names = sorted(p.name for p in (finished.folder.training / "previews").iterdir())
    assert names == ["real.png", "step-000000003.png", "step-000000006.png"]
    assert all(f"<h3>step {step}</h3>" in page for step in (3, 6))
    assert "Held-out images, and the same ones encoded and decoded" in page
    assert "nearest among all 120 training images, by features of the evaluation classifier" in page


def test_a_training_image_is_its_own_nearest(finished, copied):
    out = copied()
    samples, images = finished.samples[0], finished.images.training
    for number, image in enumerate(images.load(range(20))):
        Image.fromarray(image).save(out / "samples" / "guided" / f"{number:06d}.png")
    moved = Pipeline(finished.recipe, out, CPU)
    for evaluator in (moved.evaluator, Pipeline(without_classifier(finished), out, CPU).evaluator):
        gallery = nearest(moved.samples[0], moved.images, evaluator, moved.semantic)
        assert len(gallery.rows) == 8 and samples.variant in gallery.caption
        for _, (sample, first, *_) in gallery.rows:
            np.testing.assert_array_equal(sample, first)


def without_classifier(finished):
    return load_recipe(finished.folder.recipe, ["evaluation.classifier=null"])


def test_a_report_says_what_to_do_next_by_commands_that_work(finished):
    page = html.unescape(finished.folder.report.read_text())
    commands = [shlex.split(command) for command in re.findall(r"<pre>sfd ([^<]+)</pre>", page)]
    assert [command[0] for command in commands] == ["sample", "explore", "run", "run"]
    for command in commands[2:]:
        given = [argument.replace("FOLDER", "shapes") for argument in command]
        assert f"init: {finished.folder.root}" in done(*given, "--dry-run")


def test_a_finished_run_is_not_repeated(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.folder.root.rglob("*.safetensors")}
    Pipeline(finished.recipe, finished.folder.root, CPU).make_model()
    assert before == {p: p.stat().st_mtime_ns for p in finished.folder.root.rglob("*.safetensors")}


def test_the_same_recipe_gives_the_same_bytes(finished, tmp_path):
    Pipeline(finished.recipe, tmp_path, CPU).make_model()
    ours, theirs = (run / "model" / "model.safetensors" for run in (tmp_path, finished.folder.root))
    assert same_tensors(files.read_tensors(ours), files.read_tensors(theirs))


def test_a_run_without_classifier_but_with_a_guiding_model_writes_samples_and_no_metrics(finished, copied):
    out = copied("evaluator", "samples", "metrics", "*.html")
    overrides = ["evaluation.classifier=null", f"evaluation.guiding_model={finished.folder.root}"]
    overrides += ["sample.guidance_from=guiding_model"]
    pipeline = Pipeline(load_recipe(finished.folder.recipe, overrides), out, CPU)
    pipeline.make_model()
    pipeline.report()
    page = pipeline.folder.report.read_text()
    assert "sfd evaluate" in page and "Fréchet distance" not in page
    record = files.read_json(pipeline.folder.samples / "guided" / "samples.json", "samples")
    assert record["guiding"] == finished.model.identity
    guided, unguided = (read_images(pipeline.folder.samples / name, range(20)) for name in ("guided", "unguided"))
    assert np.abs(guided.astype(int) - unguided).max() <= 1  # guided by itself: unchanged, but for rounding
    with pytest.raises(SFDError, match=r"has no evaluation\.classifier"):
        _ = pipeline.evaluator.extractor


def test_evaluating_a_folder_or_an_npz_by_a_run_repeats_its_metrics(finished, tmp_path):
    guided, run = finished.folder.samples / "guided", finished.folder.root
    done("pack", guided, tmp_path / "guided.npz")
    for samples in (guided, tmp_path / "guided.npz"):
        output = done("evaluate", samples, "--run", run, "--out", tmp_path / "out.json", "--device", "cpu")
        assert "class accuracy" in output and "20, balanced" in output
        recorded = read_metrics(finished.folder.metrics / "guided-samples.json")
        assert read_metrics(tmp_path / "out.json") == recorded.model_copy(update={"name": samples.name})


def test_a_model_with_another_texture_encoder_is_refused(finished, tmp_path):
    shutil.copytree(finished.folder.model, tmp_path / "model")
    other = Pipeline(load_recipe(finished.folder.recipe, ["seed=1"]), tmp_path / "other", CPU)
    other.texture.make()
    other.texture.encoder.save(tmp_path / "model" / "texture")
    with pytest.raises(SFDError, match="made by tokenizer"):
        load_model(tmp_path / "model", CPU)


def test_a_model_encodes_images_as_the_run_did(finished, tmp_path):
    latents, numbers = LatentSet(finished.folder.latents), np.array([3, 77, 51])
    model = load_model(finished.folder.model, CPU)
    encoded = model.composite.denormalize(model.composite.unpack(model.encode(finished.images.training.load(numbers))))
    for name, values in encoded.items():
        expected = latents.read(name, numbers, np.zeros(3, bool))
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "copy")
    assert load_model(tmp_path / "copy", CPU).semantic.identity == finished.semantic.encoder.identity
    with pytest.raises(SFDError, match=r"\(B, 32, 32, 3\)"):
        model.encode(np.zeros((2, 16, 16, 3), np.uint8))
    model.compressor = None
    with pytest.raises(SFDError, match="compressor"):
        model.encode(np.zeros((2, 32, 32, 3), np.uint8))


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
    overrides = [f"data={{source: '{tmp_path / 'flat'}', holdout: 0.5}}", "evaluation.samples_per_class=8"]
    pipeline = Pipeline(load_recipe(write_recipe(tmp_path), overrides), tmp_path / "out", CPU)
    pipeline.make_model()
    pipeline.report()
    assert pipeline.model.classes == () and pipeline.folder.report.exists()
