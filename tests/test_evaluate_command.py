"""`sfd evaluate` against a reference, and `sfd pack`, by way of a tiny DINOv2."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sfd.cli.main import main
from sfd.evaluation.evaluate import read_metrics
from sfd.evaluation.extractors._base import pretrained
from sfd.evaluation.metrics import frechet_distance, gaussian, precision_recall

COUNT = 12
MADE, REAL = np.random.default_rng(0).integers(256, size=(2, COUNT, 16, 16, 3), dtype=np.uint8)


def sfd(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in result.output


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
    expected = frechet_distance(gaussian(real.features), gaussian(made.features))
    assert metrics.frechet_distance == pytest.approx(expected, rel=1e-3)
    assert (metrics.precision, metrics.recall) == precision_recall(real.features, made.features)
    assert metrics.n_samples == metrics.protocol.reference_count == COUNT
    assert metrics.protocol.extractor_identity == judge.identity
    assert f"FD-DINOv2          {metrics.frechet_distance:.3f}" in result.output
    assert "12 samples, published FID-50K takes 50,000" in result.output
    assert (folder / "results" / "features").is_dir()


def test_parts_and_the_whole_give_the_same_numbers(folder, weights):
    assert evaluate(folder, weights, "--out", folder / "whole.json", "--features", folder / "a").exit_code == 0
    for part in ("2/2", "1/2"):
        result = evaluate(folder, weights, "--part", part, "--out", folder / "no.json", "--features", folder / "b")
        assert result.exit_code == 0 and f"part {part} is done" in result.output
    assert not (folder / "no.json").exists()
    assert evaluate(folder, weights, "--out", folder / "parts.json", "--features", folder / "b").exit_code == 0
    assert (folder / "whole.json").read_bytes() == (folder / "parts.json").read_bytes()


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
    refused(evaluate(folder, tmp_path / "other"), "type 'dinov2_with_registers'", "takes 'dinov2'")
    refused(evaluate(folder, tmp_path / "nowhere"), "nowhere is neither a folder nor a model")


def test_what_does_not_go_together_is_refused(folder):
    made, real = folder / "made", folder / "real"
    refused(sfd("evaluate", made), "either --run RUN, or --reference")
    refused(sfd("evaluate", made, "--run", real, "--reference", real), "either --run")
    refused(sfd("evaluate", made, "--run", real, "--part", "1/2"), "--part goes with --reference")
    refused(sfd("evaluate", made, "--reference", real), "needs --extractor")
    refused(sfd("evaluate", made, "--reference", real, "--extractor", "classifier"), "--run RUN")
    refused(sfd("evaluate", made, "--reference", real, "--extractor", "dinov"), "did you mean 'dinov2'")
    for part in ("0/2", "3/2", "1", "a/b"):
        arguments = ("--reference", real, "--extractor", "dinov2", "--part", part)
        refused(sfd("evaluate", made, *arguments), f"--part '{part}'")
    refused(sfd("pack", made, folder / "made.zip"), "no name of an .npz")
