"""The page of figures says what was measured; the benchmark's plain and fast steps do the same work."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from benchmarks.speed import checkpoints, latents, measuring, overhead, report
from benchmarks.speed.__main__ import SECTIONS, chosen, sizes
from benchmarks.speed.measuring import Setting
from benchmarks.speed.training import Training
from sfd.errors import SFDError
from sfd.sampling import initial_noise

CPU = torch.device("cpu")


def test_the_tables_are_those_of_the_results():
    results = json.loads(report.RESULTS.read_text())
    text = report.PAGE.read_text()
    assert report.page(text, results) == text
    for kept in (results, *(rows for rows in results.values() if isinstance(rows, dict))):
        measured = [name for name, rows in kept.items() if name != "machine" and isinstance(rows, list)]
        assert sorted(row["section"] for row in kept["machine"]) == sorted(measured)
    for name in (name for name, section in SECTIONS.items() if not section.cuda):
        shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert ("|" in shown) == (name in results), f"{name}: figures without a source, or not shown"


def test_every_figure_that_the_page_shows_is_there():
    shown = re.findall(r"\]\((figures/[^)]+)\)", report.PAGE.read_text())
    assert "figures/speed.png" in shown
    assert [name for name in shown if not (report.PAGE.parent / name).is_file()] == []


def test_publishing_replaces_the_sections_that_ran_and_keeps_the_others(tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE", "FIGURE"):
        monkeypatch.setattr(report, name, tmp_path / name.lower())
    marks = "<!-- errors -->\n<!-- end of errors -->\n<!-- machine -->\n<!-- end of machine -->\n"
    report.PAGE.write_text(marks)
    for name, error in (("errors", 1.0), ("loop", 2.0), ("errors", 3.0)):
        report.publish({"machine": [{"section": name}], name: [{"error": error}]})
    kept = json.loads(report.RESULTS.read_text())
    assert kept == {
        "machine": [{"section": "loop"}, {"section": "errors"}],
        "errors": [{"error": 3.0}],
        "loop": [{"error": 2.0}],
    }
    assert report.PAGE.read_text() == report.page(marks, json.loads(report.RESULTS.read_text())) != marks
    assert report.FIGURE.is_file()


def test_figures_of_a_gpu_are_kept_apart_and_shown_together(tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE", "FIGURE"):
        monkeypatch.setattr(report, name, tmp_path / name.lower())
    marks = "<!-- errors -->\n<!-- end of errors -->\n<!-- cuda -->\n<!-- end of cuda -->\n"
    report.PAGE.write_text(marks)
    report.publish({"machine": [{"section": "errors"}], "errors": [{"error": 1.0}]})
    report.publish({"machine": [{"section": "errors"}], "errors": [{"error": 2.0}]}, "cuda")
    kept = json.loads(report.RESULTS.read_text())
    assert kept["errors"] == [{"error": 1.0}] and kept["cuda"]["errors"] == [{"error": 2.0}]
    before, after = report.PAGE.read_text().split("<!-- cuda -->")
    assert "| 1 |" in before and "`errors`:\n\n| error |\n|---|\n| 2 |" in after


@pytest.mark.parametrize("text", ["S", "S:0", "Z:4", "S:8;B:8"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(SFDError, match="such as S:8,B:8"):
        sizes(text)
    assert sizes("S:8,B:16,") == (("S", 8), ("B", 16))


def test_a_section_that_the_device_does_not_have_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(SFDError, match="no section guided on cpu; choose of sampling, errors"):
        chosen("errors,guided", Setting(CPU, quick=True, repeats=1, out=tmp_path))


def test_tables_show_each_kind_of_figure():
    rows = [
        {"way": "a", "ratio": 1.234, "working_bytes": 2**30, "images": 1234.5, "resumed_seconds": 5.678},
        {"way": "b", "ratio": None, "share_of_matrix_rate": 0.5, "pause_milliseconds": 5.678},
    ]
    assert report.table(rows).splitlines()[2:] == [
        "| a | 1.23 | 1,024.0 MiB | 1,234 | 5.68 | — | — |",
        "| b | — | — | — | — | 50% | 5.68 |",
    ]


@pytest.fixture
def small(monkeypatch):
    """Name a size of network that takes no time."""
    monkeypatch.setitem(measuring.SIZES, "small", measuring.SIZES["tiny"]._replace(depth=2, width=32, heads=2))
    return "small"


def test_the_fast_step_of_the_benchmark_does_what_the_plain_one_does(small):
    made = measuring.network(small)
    steps = []
    for way in ("float32", "bf16"):
        torch.manual_seed(0)
        steps.append(Training(made, 2, CPU, way))
        steps[-1].bf16 = False
        steps[-1]()
    for plain, fast in zip(*(step.average.parameters() for step in steps), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


def test_working_memory_is_what_a_call_takes_and_gives_back():
    def call():
        torch.ones(48 << 18)
        torch.ones(32 << 18)

    call()
    used = measuring.working_memory(call, CPU)
    if used is None:
        pytest.skip("this platform cannot tell")
    assert used == pytest.approx(48 << 20, rel=0.1)


def test_working_memory_is_unknown_where_the_platform_cannot_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "PROCESS", tmp_path / "none")
    assert measuring.working_memory(lambda: None, CPU) is None
    assert measuring.working_memory(lambda: None, torch.device("meta")) is None


def test_random_latents_of_the_published_shapes_can_be_trained_on(tmp_path, monkeypatch, small):
    monkeypatch.setattr(latents, "COUNT", 4)
    batch = latents.task_like_published(small, 2, tmp_path).batch(0, range(2))
    assert batch["x1"].shape == batch["x0"].shape == (2, measuring.COMPOSITE.size)
    assert batch["features"].shape == (2, 768, 16, 16)


def test_a_checkpoint_holds_weights_average_and_moments(tmp_path, small):
    row = checkpoints.saved(small, Setting(CPU, quick=True, repeats=1, out=tmp_path))
    parameters = sum(p.numel() for p in measuring.network(small).parameters())
    assert row["checkpoint_bytes"] == pytest.approx(16 * parameters, rel=0.05)
    assert not list(tmp_path.iterdir())


def test_the_plain_sampler_solves_the_same_equation():
    noise = initial_noise(range(2), measuring.COMPOSITE).double()

    def velocity(x, times):
        return (1 - x) * (1 + measuring.COMPOSITE.expand(times))

    plain = overhead.published_sampling(velocity, noise, rtol=1e-6)
    exact = 1 + (noise - 1) * math.exp(-1.5)  # each stream's time runs from 0 to 1, whatever its clock
    torch.testing.assert_close(plain, exact, rtol=0, atol=3e-3)  # it steps across the knots
