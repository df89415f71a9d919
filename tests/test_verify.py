"""`sfd verify`: the published numbers come out, at any size; what differs, is unknown or is damaged is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from reference_folder import write_transformer
from sfd.cli.main import main
from sfd.verification import verify
from sfd.verification._case import relative_error
from sfd.verification.transformer import INPUTS

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def findings():
    """All published numbers, at a tenth of the tolerance that users get."""
    return verify(GOLDEN, CPU, tolerance=1e-5)


def test_all_published_numbers_come_out(findings):
    assert findings.failed == () and findings.errors == ()


def test_every_published_number_is_looked_at(findings):
    looked_at = {(row.case, row.quantity) for row in findings.rows}
    inputs = INPUTS | {"features", "images", "reference_features", "sample_features", "sample_probabilities"}
    for path in GOLDEN.glob("*.io.safetensors"):
        case = path.name.removesuffix(".io.safetensors")
        assert {(case, name) for name in load_file(path).keys() - inputs} <= looked_at
    shards = {("latent_shards", name) for name in load_file(GOLDEN / "latent_shards.expected.safetensors")}
    assert shards <= looked_at
    for path in GOLDEN.glob("keys_*.json"):
        assert {(path.stem, f"tensors {what}") for what in ("missing", "unexpected")} <= looked_at
    numbers = {name for name, value in json.loads((GOLDEN / "metrics.json").read_text()).items() if name != "note"}
    assert {("metrics", name) for name in numbers} <= looked_at
    assert findings.missing == () and findings.unchecked == ()


SIZES = {
    "as published": {},
    "patch 2": {"patch_size": 2, "in_channels": 5, "semantic_chans": 1},
    "texture alone": {"semantic_chans": 0, "semfirst_delta_t": 0.0},
    "one clock": {"semfirst_delta_t": 0.0},
    "one after the other": {"semfirst_delta_t": 1.0, "euler": (4, 0.0)},
    "steps on both knots": {"semfirst_delta_t": 0.6, "euler": (9, 0.0)},
    "steps on both knots, rounded off one": {"semfirst_delta_t": 0.3, "euler": (14, 0.0)},
    "no REPA": {"use_repa": False, "semfirst_delta_t": 0.55},
    "no guide, no samples": {"guide": False, "euler": None},
    "no null class": {"class_dropout_prob": 0, "num_classes": 3},
    "wider": {"hidden_size": 48, "num_heads": 3, "input_size": 6, "in_channels": 11, "euler": (9, 0.3)},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_other_sizes(changes, tmp_path):
    write_transformer(tmp_path, "other", **changes)
    found = verify(tmp_path, CPU, tolerance=1e-5)
    assert found.failed == () and found.unchecked == () and found.errors == ()
    expected = {name for name in load_file(tmp_path / "other.io.safetensors") if name not in INPUTS}
    assert expected <= {row.quantity for row in found.rows}


@pytest.fixture
def folder(tmp_path):
    """A small folder to break things in."""
    write_transformer(tmp_path, "dit", depth=1, euler=None)
    return tmp_path


def command(folder: Path, *options: str):
    result = CliRunner().invoke(main, ["verify", str(folder), *options])
    assert "Traceback" not in result.output
    return result


def change(path: Path, **tensors):
    save_file({**load_file(path), **tensors}, path)


def test_a_folder_that_fits_exits_with_0(folder):
    result = command(folder, "--device", "cpu", "--json", str(folder / "out" / "found.json"))
    assert result.exit_code == 0, result.output
    assert "all 16 quantities are within tolerance" in result.output
    record = json.loads((folder / "out" / "found.json").read_text())
    assert record["passed"] and len(record["rows"]) == 16 and all(row["error"] < 1e-5 for row in record["rows"])


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["velocity", "velocity_autoguided_sem2_tex1p5", "loss_repa", "grad.x_embedder.proj.weight"]
)
def test_one_other_number_exits_with_1(folder, name, value):
    path = folder / "dit.io.safetensors"
    tensor = load_file(path)[name].clone()
    tensor.view(-1)[-1] += value
    change(path, **{name: tensor})
    result = command(folder)
    assert result.exit_code == 1
    assert [line.split()[1] for line in result.output.splitlines() if line.rstrip().endswith("FAILED")] == [name]
    assert "1 of 16 quantities FAILED" in result.output


@pytest.mark.parametrize("name", ["pos_embed", "blocks.0.attn.q_norm.weight"])
def test_one_other_weight_exits_with_1(folder, name):
    tensor = load_file(folder / "dit.weights.safetensors")[name].clone()
    tensor.view(-1)[-1] += 0.5
    change(folder / "dit.weights.safetensors", **{name: tensor})
    assert command(folder).exit_code == 1


def test_other_latents_exit_with_1(tmp_path):
    shutil.copytree(GOLDEN / "latent_shards", tmp_path / "shards")
    expected = load_file(GOLDEN / "latent_shards.expected.safetensors")
    expected["composite_flip"][3, 1, 2, 0] += 0.1
    del expected["features_plain"]
    save_file(expected, tmp_path / "shards.expected.safetensors")
    result = command(tmp_path)
    assert result.exit_code == 1
    failed = [line.split()[1] for line in result.output.splitlines() if line.rstrip().endswith("FAILED")]
    assert failed == ["composite_flip"]
    assert "no reference for: shards: features_plain" in result.output


def test_what_nobody_knows_is_listed(folder):
    change(
        folder / "dit.io.safetensors", velocity_squared=torch.ones(3), **{"grad.blocks.9.norm1.weight": torch.ones(3)}
    )
    (folder / "other.json").write_text('{"colour": "blue"}')
    save_file({"more": torch.ones(3)}, folder / "dit.more.safetensors")
    result = command(folder)
    assert result.exit_code == 0
    for name in ("dit: velocity_squared", "dit: grad.blocks.9.norm1.weight", "other.json", "dit.more.safetensors"):
        assert f"not checked: {name}" in result.output
    assert "4 not checked" in result.output


def test_what_has_no_reference_is_listed(folder):
    tensors = load_file(folder / "dit.io.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k not in ("velocity_cfg", "loss_total")}, folder / "dit.io.safetensors"
    )
    output = command(folder).output
    assert "no reference for: dit: velocity_cfg" in output and "no reference for: dit: loss_total" in output


def test_names_without_a_place_exit_with_1(tmp_path):
    keys = json.loads((GOLDEN / "keys_sdvae_f16d32.json").read_text())
    state = keys["state_dict"]
    state["decoder.up.0.block.0.conv9.bias"] = state.pop("decoder.up.0.block.0.conv1.bias")
    (tmp_path / "some_names.json").write_text(json.dumps(keys))
    result = command(tmp_path)
    assert result.exit_code == 1
    words = [line.split() for line in result.output.splitlines() if " tensors " in line]
    assert [(row[2], row[-3]) for row in words] == [("missing", "1"), ("unexpected", "1"), ("misshapen", "0")]


def refused(folder: Path, *words: str) -> None:
    result = command(folder)
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output


def test_one_bad_case_hides_no_other(folder):
    write_transformer(folder, "another", depth=1, guide=False, euler=None)
    (folder / "dit.io.safetensors").write_bytes(b"nothing")
    result = command(folder, "--json", str(folder / "out" / "found.json"))
    assert result.exit_code == 2
    assert "case dit: " in result.output and "dit.io.safetensors is no intact" in result.output
    record = json.loads((folder / "out" / "found.json").read_text())
    assert {"another"} < {row["case"] for row in record["rows"]} and all(row["passed"] for row in record["rows"])
    assert not record["passed"] and len(record["errors"]) == 1


def test_autoguidance_has_the_published_scale_where_none_is_given(folder):
    about = json.loads((folder / "dit.json").read_text())
    assert about.pop("autoguidance_scale") == 1.25
    (folder / "dit.json").write_text(json.dumps(about))
    tensors = load_file(folder / "dit.io.safetensors")
    strong = tensors["velocity"]
    change(folder / "dit.io.safetensors", velocity_autoguided=strong + (tensors["velocity_autoguided"] - strong) * 2)
    assert command(folder).exit_code == 0


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "none", "none")


def test_a_folder_without_cases(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    refused(tmp_path, "no reference cases")


def test_a_missing_file(folder):
    (folder / "dit.weights.safetensors").unlink()
    refused(folder, "dit.weights.safetensors is missing")


def test_a_truncated_file(folder):
    path = folder / "dit.io.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "dit.io.safetensors is no intact")


def test_a_damaged_json(folder):
    (folder / "dit.json").write_text('{"config": ')
    refused(folder, "dit.json is damaged")


def test_a_missing_input(folder):
    tensors = load_file(folder / "dit.io.safetensors")
    del tensors["t_texture"]
    save_file(tensors, folder / "dit.io.safetensors")
    refused(folder, "dit.io.safetensors lacks the tensor 't_texture'")


def test_an_input_of_another_shape(folder):
    change(folder / "dit.io.safetensors", x=torch.zeros(2, 7, 5, 5))
    refused(folder, "'x' has shape (2, 7, 5, 5), expected (any, 7, 4, 4)")


def test_labels_beyond_the_classes(folder):
    change(folder / "dit.io.safetensors", y=torch.tensor([0, 9]))
    refused(folder, "case dit")


def test_weights_of_another_network(folder):
    shutil.copy(folder / "dit.guide_weights.safetensors", folder / "dit.weights.safetensors")
    refused(folder, "case dit", "misshapen")


def test_the_error_is_relative_in_the_2_norm():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.tensor([0.0])))
