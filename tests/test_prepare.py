"""`sfd prepare`: latents encoded by several ranks, or replaced by published ones."""

import shutil

import pytest
import torch

from helpers.cli import done, refused, sfd
from helpers.compare import contents
from sfd.data.shards import LatentSet
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.run.validate import check, latent_bytes
from sfd.utils import files
from sfd.utils.errors import SFDError
from tiny import write_recipe

CPU = torch.device("cpu")
SMALL = ("latents.shard_size=10", "latents.batch_size=1")


@pytest.fixture(scope="module")
def encoders(finished, tmp_path_factory):
    """Copy the encoders of a run, and nothing else, into a new folder."""

    def copy(*parts):
        out = tmp_path_factory.mktemp("run") / "out"
        for part in parts or ("texture", "semantic", "compressor"):
            shutil.copytree(finished.folder.root / part, out / part)
        return out

    return copy


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(encoders, recipe):
    """The latents of one process."""
    pipeline = Pipeline(load_recipe(recipe, SMALL), encoders(), CPU)
    pipeline.latents.make()
    return contents(pipeline.folder.latents)


def test_the_last_rank_of_an_array_job_finishes_the_stage_and_adds_up_the_time(encoders, recipe, alone, monkeypatch):
    out = encoders()
    monkeypatch.setenv("WORLD_SIZE", "2")
    seconds = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        pipeline = Pipeline(load_recipe(recipe, SMALL), out, CPU)
        pipeline.latents.make()
        seconds.append(files.read_json(out / "latents" / "stage.json", "stage")["seconds"])
        assert pipeline.latents.finished() == (rank == 0)
    assert contents(out / "latents") == alone and seconds[1] > seconds[0] > 0


def test_without_semantics_no_semantic_encoder_is_needed(encoders, recipe):
    out = encoders("texture")
    baseline = ["streams.semantic=null", "schedule={name: synchronous}", "loss.repa=0"]
    baseline += ["semantic={name: vit, pretrained: nobody/nothing}"]
    pipeline = Pipeline(load_recipe(recipe, baseline), out, CPU)
    check(pipeline.recipe)
    pipeline.make_model()
    assert set(LatentSet(out / "latents").manifest.streams) == {"texture"}
    assert pipeline.model.composite.names == ("texture",)
    assert not (out / "semantic").exists() and not (out / "compressor").exists()


def test_a_disk_that_is_too_small_is_refused_before_encoding(encoders, recipe, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    out = encoders()
    with pytest.raises(SFDError, match=r"GiB free; free some.*latents\.features=false"):
        Pipeline(load_recipe(recipe), out, CPU).latents.make()
    assert not list((out / "latents").glob("shard-*"))


def test_the_size_on_disk_is_estimated_exactly(finished):
    latents = finished.folder.latents
    per_image = sum(latent_bytes(finished.recipe)) + 8  # and its label
    tensors = sum(t.nbytes for path in latents.glob("*.safetensors") for t in files.read_tensors(path).values())
    assert tensors == per_image * len(LatentSet(latents))


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory):
    """The finished run's latents as published shards."""
    out = tmp_path_factory.mktemp("published") / "shards"
    done("export-latents", finished.folder.root, out)
    return out


def overrides(finished, published):
    texture = f"texture={{name: autoencoder_kl, train: null, config: {{}}, folder: '{finished.folder.texture}'}}"
    data = ["data={source: null, count: 20000}", "evaluation.classifier=null"]
    return [f"latents.published='{published}'", texture, *data]


def test_a_run_on_published_latents_needs_no_images(finished, published, recipe, tmp_path):
    out = tmp_path / "o"
    done("run", recipe, *overrides(finished, published), "--out", out, "--device", "cpu")
    model = Pipeline(load_recipe(out / "recipe.yaml"), out, CPU).model
    for ours, theirs in zip(model.composite.streams, finished.model.composite.streams, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-6) and ours.std == pytest.approx(theirs.std)
    assert not (out / "semantic").exists() and (out / "report.html").exists()
    done("export-latents", out, tmp_path / "again")


def test_changed_published_shards_are_refused(finished, published, recipe, tmp_path):
    shards = shutil.copytree(published, tmp_path / "shards")
    arguments = [*overrides(finished, shards), "--out", tmp_path / "o", "--device", "cpu"]
    done("prepare", recipe, *arguments)
    path = min(shards.glob("*.safetensors"))
    tensors = files.read_tensors(path)
    files.write_tensors(path, {**tensors, "latents": tensors["latents"] + 1})
    refused(sfd("train", recipe, *arguments), "published was ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.image_size=64", "16 channels on 4×4, but the texture encoder decodes 16 channels on 8×8"),
        ("texture={name: autoencoder_kl, config: {widths: [16, 16]}, folder: null, train: {steps: 1, "
         "batch_size: 1, learning_rate: 1.0e-3}}", "would decode them to noise"),
        ("latents.published=null", "data.source is missing"),
        ("latents.published='nowhere'", "there is no folder nowhere"),
        ("evaluation={samples_per_class: 2, classifier: {training: {steps: 3, batch_size: 8, learning_rate: 1.0e-3}}}",
         "evaluation.classifier=null"),
    ],
)  # fmt: skip
def test_published_latents_that_do_not_fit_are_refused(finished, published, recipe, override, words):
    with pytest.raises(SFDError) as refusal:
        check(load_recipe(recipe, [*overrides(finished, published), override]))
    assert words in str(refusal.value)


def test_published_latents_without_semantics_or_features_are_refused(finished, published, recipe, tmp_path):
    shards = shutil.copytree(published, tmp_path / "shards")
    for kept, words in (("latents_sv", "holds no features"), ("latents", "holds no semantic latents")):
        for path in shards.glob("*.safetensors"):
            tensors = files.read_tensors(path)
            dropped = "feats_dino" if kept == "latents_sv" else "latents_sv"
            files.write_tensors(path, {k: t for k, t in tensors.items() if not k.startswith(dropped)})
        with pytest.raises(SFDError, match=words):
            check(load_recipe(recipe, overrides(finished, shards)))
