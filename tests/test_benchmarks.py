"""The benchmarks run, and the pages of docs/ show what they measured."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import guided, measure, report, scaling, solvers
from benchmarks.__main__ import SECTIONS, chosen, sizes
from benchmarks.measure import Setting
from benchmarks.quality import compared
from benchmarks.training import plain_forward
from sfd.evaluation.metrics import frechet_distance, gaussian
from sfd.utils.errors import SFDError

CPU = torch.device("cpu")
PAGES = sorted(report.DOCS.rglob("*.md"))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A network that takes no time."""
    monkeypatch.setitem(measure.SIZES, "small", measure.SIZES["tiny"]._replace(depth=2, width=32, heads=2))
    return Setting(CPU, tmp_path, quick=True, repeats=1, given=(("small", 2),), compile=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_kept_results(page):
    text = page.read_text(encoding="utf-8")
    assert report.fill(text, report.read()) == text
    assert set(re.findall(r"<!-- (?!end of )(\w+) -->", text)) <= {*SECTIONS, "machine", "cuda", "table"}


def test_every_section_has_a_place_and_every_result_a_section():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(text.count(f"<!-- {name} -->") == 1 for name, section in SECTIONS.items() if not section.cuda)
    assert {name for kept in report.read().values() for name in kept} <= set(SECTIONS)


@pytest.mark.parametrize("name", ["sampling", "memory", "checkpointing", "scaling_weak"])
def test_the_rows_of_a_section_print_as_a_table(setting, name):
    lines = report.table(SECTIONS[name].rows(setting)).splitlines()
    assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1


def test_a_failing_section_does_not_stop_the_others(setting, monkeypatch, capsys):
    monkeypatch.setitem(SECTIONS, "bad", command.Section(lambda setting: 1 / 0))
    monkeypatch.setitem(SECTIONS, "good", command.Section(lambda setting: [{"error": 1.0}]))
    assert command.measure(["bad", "good"], setting, publish=False) == ["bad"]
    printed = capsys.readouterr()
    assert "ZeroDivisionError" in printed.err and "| 1 |" in printed.out


def test_rows_of_a_section_that_fails_later_are_kept(setting, monkeypatch):
    monkeypatch.setitem(SECTIONS, "long", command.Section(lambda setting: ({"error": 1 / n} for n in (2, 1, 0))))
    assert command.measure(["long"], setting, publish=False) == ["long"]
    kept = json.loads((setting.out / "results.json").read_text())["cpu"]["long"]
    assert kept["rows"] == [{"error": 0.5}, {"error": 1.0}] and kept["machine"]["device"]


def test_the_script_for_a_gpu_names_a_missing_package(tmp_path):
    environment = {"PATH": os.environ["PATH"], "OUT": str(tmp_path), "PYTHON": f"{sys.executable} -S", "REHEARSE": "1"}
    script = measure.ROOT / "benchmarks/gpu.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pydantic" in done.stderr and "WHEELS" in done.stderr


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder of pages in place of docs/, whose one page has places for `a`, `b` and a GPU."""
    monkeypatch.setattr(report, "publish", partial(report.publish, docs=tmp_path / "docs"))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ("a", "b", "cuda", "machine")))
    return page


def section(error, quick=False):
    return {"machine": {"device": "x"}, "rows": [{"error": error}], "quick": quick}


def take(monkeypatch, folder, found):
    (folder / "taken.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--take", str(folder / "taken.json")])
    command.main()


def test_publishing_replaces_a_section_and_keeps_the_others(page):
    for name, value, device in (("a", 1.0, "cpu"), ("b", 2.0, "cpu"), ("a", 3.0, "cpu"), ("a", 4.0, "cuda")):
        report.publish({device: {name: section(value)}})
    shown = re.sub(r"\s", "", page.read_text())
    assert "|3|<!--endofa-->" in shown and "|2|<!--endofb-->" in shown and "|4|<!--endofcuda-->" in shown
    assert "|1|" not in shown and shown.count("|x|") == 3
    with pytest.raises(SFDError, match="c on cpu"):
        report.publish({"cpu": {"c": section(1.0)}})


def test_results_of_another_machine_are_published(page, tmp_path, monkeypatch):
    take(monkeypatch, tmp_path, {"cuda": {"a": section(1.0), "b": section(2.0)}, "cpu": {"b": section(3.0)}})
    shown = re.sub(r"\s", "", page.read_text())
    assert "|1|`b`" in shown and "|2|<!--endofcuda-->" in shown and "|3|<!--endofb-->" in shown


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"cpu": {"a": section(1.0), "b": section(2.0, quick=True)}}, "b on cpu was measured with --quick"),
        ({"cpu": {"a": section(1.0), "c": section(2.0)}}, "c on cpu"),
        ({"cpu": {"a": {"rows": [], "machine": None}}}, "results.json"),
        ([], "results.json"),
    ],
    ids=["quick", "no place", "unmarked", "a list"],
)
def test_results_that_cannot_be_published_change_nothing(page, tmp_path, monkeypatch, capsys, found, said):
    before = page.read_text()
    with pytest.raises(SystemExit) as stopped:
        take(monkeypatch, tmp_path, found)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert page.read_text() == before and list(page.parent.iterdir()) == [page]


def test_what_is_measured_joins_earlier_results(setting, monkeypatch):
    monkeypatch.setitem(SECTIONS, "a", command.Section(lambda setting: [{"error": 1.0}]))
    monkeypatch.setitem(SECTIONS, "b", command.Section(lambda setting: [{"error": 2.0}]))
    for name, quick in (("a", True), ("b", True), ("a", False)):
        assert command.measure([name], replace(setting, quick=quick), publish=False) == []
    kept = json.loads((setting.out / "results.json").read_text())["cpu"]
    assert {name: (each["rows"][0]["error"], each["quick"]) for name, each in kept.items()} == {
        "a": (1.0, False),
        "b": (2.0, True),
    }


def test_sections_are_chosen_by_prefix_and_unknown_ones_refused(setting):
    assert set(chosen(["scaling", "errors"], setting)) == {n for n in SECTIONS if n.startswith(("scaling", "errors"))}
    assert "guided" not in chosen([], setting)
    assert chosen(["guided"], setting) == ["guided"]
    with pytest.raises(SFDError, match="guided"):
        chosen(["giuded"], setting)
    assert sizes("S:8,B:16") == (("S", 8), ("B", 16))
    with pytest.raises(SFDError, match="S:8,B:8"):
        sizes("Z:4")


def test_working_memory_is_the_peak_of_a_call():
    used = measure.working_memory(lambda: torch.ones(48 << 18).add_(1).sum(), CPU)
    assert used is None or used == pytest.approx(48 << 20, rel=0.1)


def test_the_plain_training_step_computes_the_same_velocity(setting):
    network = measure.network("small")
    given = torch.randn(2, measure.COMPOSITE.size), torch.rand(2, 2), measure.class_labels(2, CPU)
    torch.testing.assert_close(plain_forward(network, *given).velocity, network(*given).velocity, rtol=1e-4, atol=1e-5)


def test_fitted_heads_predict_better_than_nothing(setting, monkeypatch):
    monkeypatch.setattr(guided, "FITTED", 16)
    network = guided.fitted("small", CPU).transformer
    data, labels = guided.procedural_latents(16)
    noise, times = torch.randn_like(data), measure.SCHEDULE.at(torch.full((16,), 0.5)).time
    found = network(torch.lerp(noise, data, measure.COMPOSITE.per_entry(times)), times, labels).velocity
    assert (found - (data - noise)).square().mean() < (data - noise).square().mean()


def test_stochastic_samples_are_compared_with_the_exact_distribution(setting, monkeypatch):
    monkeypatch.setattr(solvers, "AT_ONCE", 100)
    rows = solvers.stochastic(setting, count=200, steps=(4,))
    drawn = gaussian(solvers.mixture().sample(20_000, seed=1).numpy())
    truth = frechet_distance(solvers.moments(solvers.mixture()), drawn)
    assert truth < min(row["frechet_distance"] for row in rows) / 10  # many samples are near the truth
    assert rows[-1]["log_density"] < rows[0]["log_density"] - 1  # steps as long as these miss the modes


def test_nfe_at_an_error_is_interpolated():
    curve = [(10, 1e-1), (20, 1e-3), (30, 1e-2), (40, 1e-4)]
    assert solvers.nfe_at(curve, 1e-3) == round(math.sqrt(30 * 40))
    assert solvers.nfe_at(curve, 1e-5) is None and solvers.nfe_at(curve, 1.0) == 10


def test_relative_difference_of_loss_curves():
    plain = [3 - k / 20 for k in range(40)]
    row = compared([1.02 * loss for loss in plain], plain)
    assert row["its_relative_difference"] == pytest.approx(0.02) == row["largest_relative_difference"]


def test_bytes_of_an_all_reduce():
    """A ring all-reduce moves 2·(n − 1)/n of 4 bytes per parameter; one GPU none."""
    given = scaling.Assumptions(link_share=1.0)
    expected = 2 * 7 / 8 * 4 * scaling.parameter_count(scaling.network("XL")) / given.nvlink
    assert scaling.communication("XL", given, 8) == pytest.approx(expected)
    assert scaling.communication("XL", given, 1) == 0
    assert scaling.assumptions(("mfu=0.2", "node=4")) == scaling.replace(scaling.Assumptions(), mfu=0.2, node=4)
