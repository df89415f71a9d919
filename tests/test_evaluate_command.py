"""`sfd evaluate` against a reference, and `sfd pack`, by way of a tiny DINOv2."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sfd.cli.main import main
from sfd.evaluation import features
from sfd.evaluation.evaluate import read_metrics
from sfd.evaluation.extractors._base import pretrained
from sfd.evaluation.metrics import frechet_distance, precision_recall

COUNT = 12
MADE, REAL = np.random.default_rng(0).integers(256, size=(2, COUNT, 16, 16, 3), dtype=np.uint8)


def sfd(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, words):
    assert result.exit_code == 2 and words in result.output, result.output


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
    return sfd(
        "evaluate", folder / samples, "--reference", folder / reference, "--extractor", "dinov2",
        "--weights", weights, "--device", "cpu", *options,
    )  # fmt: skip


def test_features_are_the_class_token_of_the_normalised_picture(weights):
    from transformers import Dinov2Model

    image = np.full((1, 16, 16, 3), (255, 0, 51), np.uint8)
    normalised = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    pixels = torch.tensor(normalised).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(weights)(pixels).pooler_output
    found = pretrained("dinov2", str(weights), torch.device("cpu")).extract(image)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.probabilities is None and found.spatial is None


def test_a_folder_is_judged_against_a_folder(folder, weights):
    result = evaluate(folder, weights, "--out", folder / "results" / "metrics.json")
    assert result.exit_code == 0, result.output
    metrics = read_metrics(folder / "results" / "metrics.json")
    judge = pretrained("dinov2", str(weights), torch.device("cpu"))
    made, real = judge.extract(MADE), judge.extract(REAL)
    expected = frechet_distance(real.features, made.features)
    assert metrics.frechet_distance == pytest.approx(expected, rel=1e-3)
    assert (metrics.precision, metrics.recall) == precision_recall(real.features, made.features)
    assert metrics.n_samples == metrics.protocol.reference_count == COUNT
    assert metrics.protocol.extractor_identity == judge.identity
    assert f"FD-DINOv2          {metrics.frechet_distance:.3f}" in result.output
    assert "12 samples, published FID-50K takes 50,000" in result.output
    assert "not reliable: 12 samples, fewer than 1,000" in result.output
    assert (folder / "results" / "features").is_dir()


def test_a_set_is_at_distance_zero_from_itself_as_folder_and_as_zip(folder, weights):
    archive = shutil.make_archive(folder / "zipped", "zip", folder / "real")
    for samples, options in (("real", ()), (archive, ()), ("real", ("--image-size", 24))):
        result = evaluate(folder, weights, "--out", folder / "self.json", *options, samples=samples, reference=samples)
        assert result.exit_code == 0, result.output
        metrics = read_metrics(folder / "self.json")
        assert metrics.frechet_distance == pytest.approx(0, abs=1e-4)
        assert metrics.precision == metrics.recall == 1


def test_ranks_and_a_single_process_give_the_same_numbers(folder, weights, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    assert evaluate(folder, weights, "--out", folder / "alone.json", "--features", folder / "a").exit_code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert not (folder / "ranks.json").exists()
        result = evaluate(folder, weights, "--out", folder / "ranks.json", "--features", folder / "b")
        assert result.exit_code == 0
    assert (folder / "alone.json").read_bytes() == (folder / "ranks.json").read_bytes()


def test_packed_samples_give_the_numbers_of_the_folder(folder, weights):
    assert sfd("pack", folder / "made", folder / "made.npz").output.endswith(f"12 images in {folder / 'made.npz'}\n")
    for name in ("made", "made.npz"):
        assert evaluate(folder, weights, "--out", folder / f"{name}.json", samples=name).exit_code == 0
    by_folder, packed = (json.loads((folder / f"{name}.json").read_text()) for name in ("made", "made.npz"))
    by_folder["name"] = packed["name"]
    assert by_folder == packed


def test_how_the_samples_were_made_is_told(folder, weights):
    flat = folder / "flat"
    flat.mkdir()
    for index, image in enumerate(MADE):
        Image.fromarray(image).save(flat / f"{index:06d}.png")
    record = {"classes": ["a", "b"], "labels": [0] * 5 + [1] * 7, "seeds": [*range(6), *range(6)], "model": "m-1"}
    (flat / "samples.json").write_text(json.dumps(record | {"sampling": {"solver": "dopri5", "guidance": 1.5}}))
    result = evaluate(folder, weights, "--out", folder / "metrics.json", samples="flat")
    assert "solver dopri5, guidance 1.5, model m-1, seeds 0-5" in result.output
    assert "12, not balanced" in result.output and "classes are not equally frequent" in result.output
    assert "6 seeds made 12 samples" in result.output
    assert json.loads((folder / "metrics.json").read_text())["sampling"]["seeds"] == "0-5"


def test_a_network_of_another_kind_is_refused(folder, tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "other")
    refused(evaluate(folder, tmp_path / "other"), "type 'dinov2_with_registers'")
    refused(evaluate(folder, tmp_path / "nowhere"), "there is no folder")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "either --run RUN, or --reference"),
        (("--run", "real", "--reference", "real"), "either --run"),
        (("--run", "real", "--extractor", "dinov2"), "go with --reference"),
        (("--run", "real"), "recipe.yaml is missing"),
        (("--reference", "real"), "needs --extractor"),
        (("--reference", "real", "--extractor", "dinov"), "did you mean 'dinov2'"),
        (("--reference", "real", "--extractor", "dinov2", "--out", "."), "is a folder"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, monkeypatch, options, words):
    monkeypatch.chdir(folder)
    refused(sfd("evaluate", "made", *options), words)


def test_an_archive_needs_its_suffix(folder):
    refused(sfd("pack", folder / "made", folder / "made.zip"), "not the name of an .npz")
