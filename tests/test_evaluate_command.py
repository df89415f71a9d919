"""`sfd evaluate` against a reference with a tiny DINOv2."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.cli import done, refused, sfd
from sfd.evaluation import features
from sfd.evaluation.evaluate import read_metrics
from sfd.evaluation.extractors._base import pretrained
from sfd.evaluation.metrics import frechet_distance, precision_recall

COUNT = 12
MADE, REAL = np.random.default_rng(0).integers(256, size=(2, COUNT, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a real DINOv2, tiny and untrained."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("weights") / "dinov2"
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Samples and real images as folders of two classes."""
    for name, images in (("made", MADE), ("real", REAL)):
        for index, image in enumerate(images):
            path = tmp_path / name / "ab"[index * 2 // COUNT] / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path


def evaluate(folder, weights, *options, samples="made", reference="real"):
    given = ("--reference", folder / reference, "--extractor", "dinov2", "--weights", weights, "--device", "cpu")
    return done("evaluate", folder / samples, *given, *options)


def test_features_are_the_class_token_of_the_normalised_image(weights):
    from transformers import Dinov2Model

    image = np.full((1, 16, 16, 3), (255, 0, 51), np.uint8)
    normalised = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    pixels = torch.tensor(normalised).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(weights)(pixels).pooler_output
    found = pretrained("dinov2", str(weights), torch.device("cpu")).extract(image)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.probabilities is None and found.spatial is None


def test_metrics_of_a_folder_against_a_folder(folder, weights):
    output = evaluate(folder, weights, "--out", folder / "results" / "metrics.json")
    metrics = read_metrics(folder / "results" / "metrics.json")
    judge = pretrained("dinov2", str(weights), torch.device("cpu"))
    made, real = judge.extract(MADE), judge.extract(REAL)
    expected = frechet_distance(real.features, made.features)
    assert metrics.frechet_distance == pytest.approx(expected, rel=1e-3)
    assert (metrics.precision, metrics.recall) == precision_recall(real.features, made.features)
    assert metrics.n_samples == metrics.protocol.reference_count == COUNT
    assert metrics.protocol.extractor_identity == judge.identity
    assert f"FD-DINOv2          {metrics.frechet_distance:.3f}" in output
    assert "not reliable: 12 samples, fewer than 1,000" in output
    assert (folder / "results" / "features").is_dir()


def test_a_folder_or_zip_has_distance_zero_to_itself(folder, weights):
    archive = shutil.make_archive(folder / "zipped", "zip", folder / "real")
    for samples, options in (("real", ()), (archive, ()), ("real", ("--image-size", 24))):
        evaluate(folder, weights, "--out", folder / "self.json", *options, samples=samples, reference=samples)
        metrics = read_metrics(folder / "self.json")
        assert metrics.frechet_distance == pytest.approx(0, abs=1e-4)
        assert metrics.precision == metrics.recall == 1


def test_ranks_and_a_single_process_give_the_same_numbers(folder, weights, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    evaluate(folder, weights, "--out", folder / "alone.json", "--features", folder / "a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert not (folder / "ranks.json").exists()
        evaluate(folder, weights, "--out", folder / "ranks.json", "--features", folder / "b")
    assert (folder / "alone.json").read_bytes() == (folder / "ranks.json").read_bytes()


def test_the_sampling_settings_are_reported(folder, weights):
    flat = folder / "flat"
    flat.mkdir()
    for index, image in enumerate(MADE):
        Image.fromarray(image).save(flat / f"{index:06d}.png")
    record = {"classes": ["a", "b"], "labels": [0] * 5 + [1] * 7, "seeds": [*range(6), *range(6)], "model": "m-1"}
    (flat / "samples.json").write_text(json.dumps(record | {"sampling": {"solver": "dopri5", "guidance": 1.5}}))
    output = evaluate(folder, weights, "--out", folder / "metrics.json", samples="flat")
    assert "solver dopri5, guidance 1.5, model m-1, seeds 0-5" in output
    assert "12, not balanced" in output and "6 seeds made 12 samples" in output
    assert json.loads((folder / "metrics.json").read_text())["sampling"]["seeds"] == "0-5"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either --run RUN, or --reference"),
        (("--run", "real", "--extractor", "dinov2"), "go with --reference"),
        (("--run", "real"), "recipe.yaml is missing"),
        (("--reference", "real"), "needs --extractor"),
        (("--reference", "real", "--extractor", "dinov"), "did you mean 'dinov2'"),
        (("--reference", "real", "--extractor", "dinov2", "--out", "."), "is a folder"),
    ],
)
def test_contradicting_options_are_refused(folder, monkeypatch, options, words):
    monkeypatch.chdir(folder)
    refused(sfd("evaluate", "made", *options), words)


def test_a_folder_of_several_folders_of_samples_is_answered_with_one_of_them(finished):
    run = finished.folder.root
    refused(sfd("evaluate", run / "samples", "--run", run), "give one, such as", "samples/guided")


def test_a_run_whose_images_were_moved_is_answered_with_how_to_say_where(finished, copied):
    run = copied()
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("source: shapes", "source: moved/photos"))
    refused(sfd("evaluate", run / "samples" / "guided", "--run", run), "moved/photos", "data.source=NEW_FOLDER")
