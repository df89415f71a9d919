"""The page of figures says what was measured; the benchmark's plain and fast steps do the same work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("run_benchmarks", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(run):
    results = json.loads(run.RESULTS.read_text()) if run.RESULTS.exists() else {}
    text = run.PAGE.read_text()
    assert run.page(text, results) == text
    for name in ("sampling", "errors", "training", "loop", "start_up", "solvers"):
        shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert ("|" in shown) == (name in results), f"{name}: figures without a source, or not shown"


def test_tables_show_each_kind_of_figure(run):
    rows = [{"way": "a", "ratio": 1.234, "peak_bytes": 2**30}, {"way": "b", "share_of_matrix_rate": 0.5}]
    assert run.table(rows).splitlines()[2:] == ["| a | 1.23 | 1.0 GiB | — |", "| b | — | — | 50% |"]


def test_the_fast_step_of_the_benchmark_does_what_the_plain_one_does(run, monkeypatch):
    monkeypatch.setitem(run.SIZES, "small", run.SIZES["tiny"]._replace(depth=1, width=32, heads=2))
    made = run.network("small")
    steps = []
    for way in ("float32", "bf16"):
        torch.manual_seed(0)
        steps.append(run.Training(made, 2, CPU, way))
        steps[-1].bf16 = False
        steps[-1]()
    for plain, fast in zip(*(step.average.parameters() for step in steps), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)
