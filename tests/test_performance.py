# ruff: noqa: E402, I001
"""The page of figures says what was measured; the benchmark's plain and fast steps do the same work."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.skip("the benchmarks are being rewritten", allow_module_level=True)
import torch

from benchmarks import guided_model, sampling_choices, solvers_trained
from benchmarks import solvers as exact
from benchmarks.speed import __main__ as command
from benchmarks.speed import checkpoints, latents, loader, measuring, overhead, report, solving
from benchmarks.speed.__main__ import SECTIONS, chosen, sizes
from benchmarks.speed.measuring import Setting
from benchmarks.speed.training import Training
from sfd.evaluation.metrics import frechet_distance, gaussian
from sfd.generation.generate import SamplingConfig, generate
from sfd.generation.model import load_model
from sfd.sampling import initial_noise
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")


def test_the_tables_are_those_of_the_results():
    results = json.loads(report.RESULTS.read_text())
    for path in report.PAGES:
        assert report.page(path.read_text(), results) == path.read_text()
    text = report.PAGES[0].read_text()
    for kept in (results, *(rows for rows in results.values() if isinstance(rows, dict))):
        measured = [name for name, rows in kept.items() if name != "machine" and isinstance(rows, list)]
        assert sorted(row["section"] for row in kept["machine"]) == sorted(measured)
    for name in (name for name, section in SECTIONS.items() if not section.cuda):
        shown = text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
        assert ("|" in shown) == (name in results), f"{name}: figures without a source, or not shown"


def test_every_figure_that_the_page_shows_is_there():
    shown = [name for path in report.PAGES for name in re.findall(r"\]\((figures/[^)]+)\)", path.read_text())]
    assert "figures/speed.png" in shown
    assert [name for name in shown if not (report.PAGES[0].parent / name).is_file()] == []


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Have everything published into a folder, two pages among it; gives what writes text into both."""
    for name in ("RESULTS", "FIGURE"):
        monkeypatch.setattr(report, name, tmp_path / "docs" / name.lower())
    monkeypatch.setattr(report, "PAGES", (tmp_path / "docs" / "first.md", tmp_path / "docs" / "second.md"))
    (tmp_path / "docs").mkdir()

    def write(text):
        for path in report.PAGES:
            path.write_text(text)

    return write


def test_publishing_replaces_the_sections_that_ran_and_keeps_the_others(pages):
    marks = "<!-- errors -->\n<!-- end of errors -->\n<!-- machine -->\n<!-- end of machine -->\n"
    pages(marks)
    for name, error in (("errors", 1.0), ("loop", 2.0), ("errors", 3.0)):
        report.publish({"machine": [{"section": name}], name: [{"error": error}]})
    kept = json.loads(report.RESULTS.read_text())
    assert kept == {
        "machine": [{"section": "loop"}, {"section": "errors"}],
        "errors": [{"error": 3.0}],
        "loop": [{"error": 2.0}],
    }
    for path in report.PAGES:
        assert path.read_text() == report.page(marks, kept) != marks
    assert report.FIGURE.is_file()


def test_figures_of_a_gpu_are_kept_apart_and_shown_together(pages):
    pages("<!-- errors -->\n<!-- end of errors -->\n<!-- cuda -->\n<!-- end of cuda -->\n")
    report.publish({"machine": [{"section": "errors"}], "errors": [{"error": 1.0}]})
    report.publish({"machine": [{"section": "errors"}], "errors": [{"error": 2.0}]}, "cuda")
    kept = json.loads(report.RESULTS.read_text())
    assert kept["errors"] == [{"error": 1.0}] and kept["cuda"]["errors"] == [{"error": 2.0}]
    before, after = report.PAGES[0].read_text().split("<!-- cuda -->")
    assert "| 1 |" in before and "`errors`:\n\n| error |\n|---|\n| 2 |" in after


def test_a_device_without_a_place_on_the_page_is_refused(pages):
    pages("<!-- cuda -->\n<!-- end of cuda -->\n")
    for device in ("cpu", "cuda"):
        report.check_place(device)
    with pytest.raises(SFDError, match=r"first.md has no place for figures of mps: write `<!-- mps -->`"):
        report.check_place("mps")


def test_files_of_numbers_of_a_gpu_are_kept_beside_those_of_the_cpu(pages, tmp_path):
    for device in ("cpu", "cuda"):
        (tmp_path / "rows.json").write_text(device)
        report.keep_file(tmp_path / "rows.json", "kept.json", device)
    assert [(tmp_path / "docs" / name).read_text() for name in ("kept.json", "kept-cuda.json")] == ["cpu", "cuda"]


@pytest.fixture
def two_sections(monkeypatch):
    """Have two sections, `good` and `bad`, of which the second fails until it is told not to; gives what tells it."""
    told, kept = [], []

    def bad(setting):
        if not told:
            raise subprocess.CalledProcessError(1, "train", stderr="the disk is full")
        return [{"error": 2.0}]

    sections = {
        "bad": command.Section(bad),
        "good": command.Section(lambda setting: [{"error": 1.0}], keep=kept.append),
    }
    monkeypatch.setattr(command, "SECTIONS", sections)
    return SimpleNamespace(mend=lambda: told.append(True), kept=kept)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speed", *map(str, arguments)])
    command.main()


def test_a_section_that_fails_is_named_at_the_end_and_loses_nothing_of_the_others(
    two_sections, pages, tmp_path, monkeypatch, capsys
):
    pages("<!-- good -->\n<!-- end of good -->\n<!-- bad -->\n<!-- end of bad -->\n")
    given = "--publish", "--device", "cpu", "--out", tmp_path / "out"
    with pytest.raises(SystemExit, match="these sections failed: bad;"):
        run(monkeypatch, *given)
    said = capsys.readouterr().err
    assert "CalledProcessError" in said and "the disk is full" in said
    assert "| 1 |" in report.PAGES[0].read_text() and len(two_sections.kept) == 1
    two_sections.mend()
    run(monkeypatch, *given, "--only", "bad")
    for path in (report.RESULTS, tmp_path / "out" / "speed.json"):
        kept = json.loads(path.read_text())
        assert [row["section"] for row in kept["machine"]] == ["good", "bad"]
        assert kept["good"] == [{"error": 1.0}] and kept["bad"] == [{"error": 2.0}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--publish"], "the figures that are kept are those of the full run"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
    ],
)
def test_arguments_that_would_measure_the_wrong_thing_are_refused(
    two_sections, tmp_path, monkeypatch, capsys, arguments, said
):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments, "--out", tmp_path / "out")
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


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
        {"way": "b", "ratio": None, "share_of_matrix_rate": 0.5, "pause_milliseconds": 5.678, "threads": 2},
        {"way": "c", "of_the_plain_sampling": 0.0876, "a_sampling_milliseconds": 10.44},
    ]
    assert report.table(rows).splitlines()[2:] == [
        "| a | 1.23 | 1,024.0 MiB | 1,234 | 5.68 | — | — | — | — | — |",
        "| b | — | — | — | — | 50% | 5.68 | 2 | — | — |",
        "| c | — | — | — | — | — | — | — | 0.09 | 10.4 |",
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
    monkeypatch.setattr(latents, "SHARDS", 2)
    monkeypatch.setattr(latents, "IMAGES", 2)
    task = latents.task_like_published(small, 2, tmp_path)
    assert len(task.latents) == 4 and len(list(task.latents.folder.iterdir())) == 2
    batch = task.batch(0, range(2))
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
        return (1 - x) * (1 + measuring.COMPOSITE.per_entry(times))

    plain = overhead.published_sampling(velocity, noise, rtol=1e-6)
    exact = 1 + (noise - 1) * math.exp(-1.5)  # each stream's time runs from 0 to 1, whatever its clock
    torch.testing.assert_close(plain, exact, rtol=0, atol=3e-3)  # it steps across the knots


def test_time_outside_of_the_network_is_what_sampling_adds_to_its_evaluations(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    field = overhead.Watched(lambda x, times: x)

    def way(velocity):
        for _ in range(2):
            velocity(torch.zeros(1), torch.zeros(2))

    # Seconds are calls of the clock: one at the beginning, two an evaluation, one at the end.
    assert overhead.timed_sampling(way, field, CPU) == (5 / 2, 2 / 2)
    assert overhead.timed_sampling(way, overhead.Watched(lambda x, times: x), torch.device("meta")) == (5 / 2, 1 / 2)
    turns = [(5.0, 1.0), (4.0, 0.5), (6.0, 3.0)]
    assert overhead.best(turns, CPU) == (6.0, 3.0)
    assert overhead.best(turns, torch.device("meta")) == (4.0, 3.5)


def test_a_sampling_takes_the_evaluations_of_the_demo_model(small):
    plain, project = overhead.sampling_overhead(small, 1, 1, CPU)
    assert plain["a_sampling_milliseconds"] == pytest.approx(81 * plain["outside_milliseconds"])
    assert project["a_sampling_milliseconds"] == pytest.approx(24 * project["outside_milliseconds"])
    ratio = project["a_sampling_milliseconds"] / plain["a_sampling_milliseconds"]
    assert project["of_the_plain_sampling"] == pytest.approx(ratio)


def test_batches_are_prepared_by_as_many_threads_as_asked_for(tmp_path):
    threads = set()

    def batch(step, samples):
        threads.add(threading.current_thread().name)
        time.sleep(0.01)
        return {"x": torch.zeros(len(samples))}

    loaded = loader.Loaded("test", SimpleNamespace(batch=batch), 2, 20, (), 2)
    for count in loader.THREADS:
        threads.clear()
        assert 0 < loader._rate(loaded, count, CPU) <= count * 2 / 0.01
        assert len(threads) == count
    assert loader._cold(loaded, 1, CPU) is None


def test_samples_of_a_stochastic_solver_are_judged_by_their_distribution(monkeypatch):
    monkeypatch.setattr(exact, "DISTRIBUTION_STEPS", (4,))
    monkeypatch.setattr(exact, "AT_ONCE", 100)
    rows = exact.distribution(count=200)
    assert [(row["method"], row["evaluations"]) for row in rows if "dopri5" not in row["method"]] == [
        ("drawn from the mixture", 0),
        ("heun", 8),
        ("sde, noise 0.5", 8),
    ]
    truth, drawn = exact.moments(exact.data()), gaussian(exact.data().sample(20_000, seed=1).numpy())
    assert frechet_distance(truth, drawn) < min(row["frechet_distance"] for row in rows) / 10  # many are near the truth
    assert rows[-1]["log_density"] < rows[0]["log_density"] - 1  # steps as long as these miss the modes


def test_each_way_of_sampling_the_trained_model_is_judged_and_noise_has_no_error(monkeypatch):
    model = load_model(solvers_trained.MODEL, CPU)
    seen = SimpleNamespace(frechet_distance=1.0, class_accuracy=0.5)
    monkeypatch.setattr(solvers_trained, "evaluate", lambda images, labels, reference, name: seen)
    monkeypatch.setattr(solvers_trained, "AT_ONCE", 10)
    monkeypatch.setattr(solving, "EVALUATIONS", (12,))
    rows = {row["method"]: row for row in solvers_trained.judged(model, None, 12, solving.methods())}
    assert set(rows) == {"converged", "dopri5, blind to knots", "dopri5", *solving.METHODS}
    assert rows["sde"]["error"] is None and rows["sde"]["evaluations"] == rows["euler"]["evaluations"] == 12
    assert rows["dopri5"]["error"] < rows["dopri5, blind to knots"]["error"] < rows["euler"]["error"]


def test_numbers_of_the_trained_model_are_kept_and_drawn(pages, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(solving, "draw_figure", drawn.append)
    (tmp_path / solving.ROWS).write_text("[]")
    for device in (CPU, torch.device("meta")):
        solving.keep_trained(Setting(device, quick=False, repeats=1, out=tmp_path))
    assert sorted(path.name for path in (tmp_path / "docs").glob("*.json")) == [
        "solvers-trained-meta.json",
        "solvers-trained.json",
    ]
    assert drawn == ["solvers_trained"]


def test_the_tables_that_sampling_is_chosen_by_are_those_of_the_results():
    kept, text = json.loads(sampling_choices.RESULTS.read_text()), sampling_choices.PAGE.read_text()
    assert set(kept) == set(sampling_choices.TABLES)
    assert not set(kept) & set(SECTIONS), "two commands would write the same table"
    assert all(text.count(report.table(rows)) == 1 for rows in kept.values())
    assert report.page(text, kept) == text


def test_publishing_a_table_keeps_the_others(tmp_path):
    results, path = tmp_path / "results.json", tmp_path / "page.md"
    path.write_text("<!-- a -->\n<!-- end of a -->\n<!-- b -->\n<!-- end of b -->\n")
    for name, error in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        sampling_choices.publish({name: [{"error": error}]}, results, path)
    assert json.loads(results.read_text()) == {"a": [{"error": 3.0}], "b": [{"error": 2.0}]}
    assert "| 3 |" in path.read_text() and "| 2 |" in path.read_text() and "| 1 |" not in path.read_text()


def test_a_batch_has_the_same_images_whatever_images_are_sampled_beside_them():
    model, how = load_model(solvers_trained.MODEL, CPU), SamplingConfig(solver="euler", steps=3, guidance=2.0)
    whole, part = guided_model.solve(model, 4, how), guided_model.solve(model, 2, how, first=2)
    torch.testing.assert_close(whole.latents[2:], part.latents, rtol=1e-3, atol=1e-4)
    labels, seeds = [2, 3], [2, 3]
    (ours,) = generate(model, labels, seeds, how)
    torch.testing.assert_close(part.latents, ours.latents, rtol=0, atol=0)
    assert part.evaluations == part.weak_evaluations == ours.evaluations == 3
    blind = guided_model.solve(model, 2, how, first=2, knots=False)
    assert guided_model.texture_errors(model, blind.latents, part.latents).min() > 0
