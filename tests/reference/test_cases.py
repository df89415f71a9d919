"""A reference that is off fails in its own row; what no test compares is listed; what is damaged fails."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import test_reference
import torch
from cases import SHIPPED, Case, find_cases
from safetensors.torch import load_file, save_file

KINDS, _, _ = find_cases(SHIPPED)
INPUTS = {"x", "y", "t_texture", "t_semantic", "noise", "loss_x1", "loss_x0", "loss_base_time", "loss_features"}
INPUTS |= {"features", "images", "reference_features", "sample_features", "sample_probabilities"}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "golden")


def check(folder, name):
    """Run a case's test, and give its rows and its failure."""
    case = Case(folder, name, torch.device("cpu"))
    try:
        getattr(test_reference, f"test_{KINDS[name]}")(case)
    except (AssertionError, pytest.fail.Exception) as failure:
        return {row.quantity: row for row in case.rows}, str(failure)
    return {row.quantity: row for row in case.rows}, ""


def change_json(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def change_tensors(path, change):
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind != "checkpoint_names"])
def test_each_reference_is_compared_with_its_own_quantity(name, copy):
    """Scale each by a factor of its own, and find that in the error of its row."""
    errors = {}

    def scaled(values):
        for quantity in values.keys() - INPUTS:
            if not isinstance(values[quantity], str):
                factor = 1.01 + 0.01 * len(errors)
                values[quantity], errors[quantity] = values[quantity] * factor, 1 - 1 / factor
        return values

    part = "expected" if name == "latent_shards" else "io"
    change_tensors(copy / f"{name}.{part}.safetensors", scaled)
    if name == "metrics":
        change_json(copy / f"{name}.json", scaled)
    rows, failure = check(copy, name)
    for quantity, error in errors.items():
        assert f"{quantity} is off" in failure
        if quantity != "reconstruction_from_mean":  # of a mean that was scaled too
            assert rows[quantity].error == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "checkpoint_names"])
def test_each_field_and_name_of_a_checkpoint_is_compared(name, copy):
    def changed(fields):
        state = fields["state_dict"]
        first, second = list(state)[-2:]
        state["other"] = state.pop(second)
        state[first] = [*state[first], 7]
        return {k: v + 1 if k.endswith("parameters") else v for k, v in fields.items()}

    change_json(copy / f"{name}.json", changed)
    rows, _ = check(copy, name)
    for row in rows.values():
        assert row.failed == (row.quantity.endswith("parameters") or row.quantity.startswith("tensors"))


def test_what_no_test_compares_is_listed(copy):
    change_tensors(copy / "semvae.io.safetensors", lambda t: {**t, "skewness": torch.ones(3)})
    change_json(copy / "semvae.json", lambda fields: {**fields, "epochs": 3})
    (copy / "other.json").write_text('{"colour": "blue"}')
    (copy / "semvae.more.safetensors").write_bytes(b"")
    rows, failure = check(copy, "semvae")
    assert not failure and [q for q, row in rows.items() if row.error is None] == ["epochs", "skewness"]
    assert find_cases(copy)[1:] == ([], ["semvae.more.safetensors", "other.json"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "semvae.weights.safetensors").unlink(),
        lambda folder: (folder / "semvae.io.safetensors").write_bytes(b"nothing"),
        lambda folder: change_tensors(folder / "semvae.io.safetensors", lambda t: {"features": t["features"]}),
        lambda folder: change_tensors(folder / "semvae.io.safetensors", lambda t: t | {"mse": t["mse"] * math.nan}),
        lambda folder: change_json(folder / "semvae.json", lambda f: {k: v for k, v in f.items() if k != "heads"}),
    ],
)
def test_a_damaged_case_fails(damage, copy):
    damage(copy)
    assert "semvae" in check(copy, "semvae")[1]


@pytest.mark.parametrize(("name", "text"), [("semvae", "{"), ("metrics", '{"a": 1}'), ("keys_semvae", "[]")])
def test_a_damaged_description_fails(name, text, copy):
    (copy / f"{name}.json").write_text(text)
    kinds, problems, _ = find_cases(copy)
    assert name not in kinds and [problem for problem in problems if name in problem]


def test_an_empty_folder_fails(tmp_path):
    assert find_cases(tmp_path)[1] and find_cases(tmp_path / "none")[1]
