"""A wrong reference number fails in its own row, values that no test compares are listed, damaged files fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import test_reference
import torch
from cases import INPUTS, Case, find_cases
from safetensors.torch import load_file, save_file

from sfd.utils.errors import SFDError

SHIPPED = Path(__file__).parents[1] / "golden"
KINDS = find_cases(SHIPPED)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "golden")


def check(folder, name):
    """Run the test of a case; give its rows, and whether it fails."""
    rows, failed = [], False
    try:
        test_reference.test_folder(folder, rows)
        if name in KINDS:
            getattr(test_reference, f"test_{KINDS[name]}")(Case(folder, name, torch.device("cpu"), rows))
    except (AssertionError, SFDError, pytest.fail.Exception):
        failed = True
    return {row.quantity: row for row in rows}, failed


def change(path, how):
    if path.suffix == ".json":
        path.write_text(json.dumps(how(json.loads(path.read_text()))))
    else:
        save_file(how(load_file(path)), path)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("keys")])
def test_each_reference_is_compared_with_its_own_quantity(name, copy):
    """Each is scaled by another factor, which must be the error of its row."""
    errors = {}

    def scaled(values):
        for quantity in values.keys() - INPUTS - {"note"}:
            factor = 1.01 + 0.01 * len(errors)
            values[quantity], errors[quantity] = values[quantity] * factor, 1 - 1 / factor
        return values

    change(copy / ("metrics.json" if name == "metrics" else next(copy.glob(f"{name}.[ie]*.safetensors")).name), scaled)
    rows, _ = check(copy, name)
    assert errors and all(rows[quantity].failed for quantity in errors)
    errors.pop("reconstruction_from_mean", None)  # of a mean that was scaled too
    assert {quantity: rows[quantity].error for quantity in errors} == pytest.approx(errors, abs=1e-3)


def test_values_that_no_test_compares_are_listed(copy):
    change(copy / "semvae.io.safetensors", lambda tensors: {**tensors, "skewness": torch.ones(3)})
    change(copy / "semvae.json", lambda fields: {**fields, "epochs": 3})
    for new in ("semvae.more.safetensors", "more.safetensors", "more.json"):
        (copy / new).write_text("{}")
    rows, failed = check(copy, "semvae")
    unchecked = {quantity for quantity, row in rows.items() if row.error is None}
    assert not failed
    assert unchecked == {"skewness", "epochs", "semvae.more.safetensors", "more.safetensors", "more.json"}


@pytest.mark.parametrize("file", ["semvae.json", "semvae.io.safetensors", "semvae.weights.safetensors"])
@pytest.mark.parametrize("how", ["missing", "unreadable", "incomplete"])
def test_a_damaged_case_or_a_folder_without_cases_fails(how, file, copy, tmp_path):
    if how == "missing":
        (copy / file).unlink()
    elif how == "unreadable":
        (copy / file).write_text("[]")
    else:
        change(copy / file, lambda values: dict(list(values.items())[::2]))
    assert check(copy, "semvae")[1] and check(tmp_path / "none", "")[1]
