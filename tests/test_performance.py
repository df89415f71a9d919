"""The page of figures says what was measured; the benchmark's plain and fast steps do the same work."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.speed import measuring, overhead, report
from benchmarks.speed.__main__ import SECTIONS, chosen
from benchmarks.speed.measuring import Setting
from benchmarks.speed.training import Training
from sfd.errors import SFDError
from sfd.sampling import initial_noise

CPU = torch.device("cpu")


def test_the_tables_are_those_of_the_results():
    results = json.loads(report.RESULTS.read_text())
    text = report.PAGE.read_text()
    assert report.page(text, results) == text
    assert sorted(row["section"] for row in results["machine"]) == sorted(name for name in results if name != "machine")
    for name in (name for name, section in SECTIONS.items() if not section.cuda):
        shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert ("|" in shown) == (name in results), f"{name}: figures without a source, or not shown"


def test_a_section_that_the_device_does_not_have_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(SFDError, match="no section guided on cpu; choose of sampling, errors"):
        chosen("errors,guided", Setting(CPU, quick=True, repeats=1, out=tmp_path))


def test_tables_show_each_kind_of_figure():
    rows = [{"way": "a", "ratio": 1.234, "peak_bytes": 2**30}, {"way": "b", "share_of_matrix_rate": 0.5}]
    assert report.table(rows).splitlines()[2:] == ["| a | 1.23 | 1.0 GiB | — |", "| b | — | — | 50% |"]


def test_the_fast_step_of_the_benchmark_does_what_the_plain_one_does(monkeypatch):
    monkeypatch.setitem(measuring.SIZES, "small", measuring.SIZES["tiny"]._replace(depth=1, width=32, heads=2))
    made = measuring.network("small")
    steps = []
    for way in ("float32", "bf16"):
        torch.manual_seed(0)
        steps.append(Training(made, 2, CPU, way))
        steps[-1].bf16 = False
        steps[-1]()
    for plain, fast in zip(*(step.average.parameters() for step in steps), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


def test_the_plain_sampler_solves_the_same_equation():
    noise = initial_noise(range(2), measuring.COMPOSITE).double()

    def velocity(x, times):
        return (1 - x) * (1 + measuring.COMPOSITE.expand(times))

    plain = overhead.published_sampling(velocity, noise, rtol=1e-6)
    exact = 1 + (noise - 1) * math.exp(-1.5)  # each stream's time runs from 0 to 1, whatever its clock
    torch.testing.assert_close(plain, exact, rtol=0, atol=3e-3)  # it steps across the knots
