"""The extractor `inception`, through torch-fidelity itself with random weights; see tests/inception_process.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sfd.cli.main import main
from sfd.utils import files

PACKAGES = Path(sys.prefix) / "inception"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The folder that the other process wrote."""
    assert PACKAGES.is_dir(), f"{PACKAGES} is missing; `make test` installs requirements-inception.txt there"
    folder = tmp_path_factory.mktemp("inception")
    script = Path(__file__).parent / "inception_process.py"
    subprocess.run([sys.executable, script, PACKAGES, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def results(seen):
    return json.loads((seen / "results.json").read_text())


@pytest.mark.parametrize(("name", "size"), [("features", 2048), ("spatial", 2023), ("probabilities", 1008)])
def test_features_equal_those_of_the_adm_evaluation(seen, name, size):
    found, expected = np.load(seen / "seen.npz")[name], np.load(seen / "by-hand.npz")[name]
    assert found.shape == (6, size) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.std() > 0


def test_distances_to_stored_moments_with_downloaded_weights(seen, results):
    assert results["fetched"][0] == 0, results["fetched"][1]
    metrics = json.loads((seen / "metrics.json").read_text())
    assert metrics["frechet_distance"] == pytest.approx(2048 * 0.1**2, rel=1e-4)
    assert metrics["sfid"] == pytest.approx(2023 * 0.2**2, rel=1e-4)
    assert metrics["precision"] == metrics["recall"] == 1
    assert metrics["inception_score"] == pytest.approx(1, abs=0.1)


def test_metrics_are_saved_with_their_protocol(seen, results):
    metrics, text = json.loads((seen / "metrics.json").read_text()), results["fetched"][1]
    checksum = files.checksum(seen / "weights.pth")
    protocol = metrics["protocol"]
    assert protocol["extractor_identity"] == f"inception-{checksum[:16]}" and checksum[:16] in text
    assert protocol["stored_moments"] and protocol["reference_count"] == 6
    assert protocol["reference"] == "reference.npz" and protocol["reference_identity"] in text
    assert metrics["balanced"] and "6, balanced" in text
    assert len(metrics["not_comparable"]) == 2
    for words in ("6 samples, published FID-50K takes 50,000", "not the published Inception"):
        assert any(words in reason for reason in metrics["not_comparable"]) and words in text


@pytest.mark.parametrize(
    ("name", "words"), [("evil", "cannot be read as tensors alone"), ("other", "weights of another network")]
)
def test_other_weights_are_refused(seen, results, name, words):
    code, text = results[name]
    assert code == 2 and words in text and f"{name}.pth" in text
    assert not (seen / "unpickled").exists()


def test_a_missing_torch_fidelity_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    arguments = ["evaluate", tmp_path / "a.npz", "--reference", tmp_path / "a.npz", "--extractor", "inception"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2 and "pip install torch-fidelity" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
