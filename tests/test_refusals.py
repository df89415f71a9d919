"""What would do nothing, or cannot be done here, is refused before anything is written, in one sentence."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers.random_model import random_model
from sfd.cli.main import main
from sfd.generation.config import SamplingConfig
from sfd.run.recipe import load_recipe
from tiny import write_recipe

ROOT = Path(__file__).parent.parent
UNGUIDED = [1.0, {}, {"semantic": 1.0}, {"semantic": 1.0, "texture": 1.0}]


def refused(*arguments, words: str = "") -> None:
    """Check that a command ends with code 2 and one line that says these words."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("sfd: error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert words in lines[0]


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture
def slow_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


def test_compiling_samples_without_a_compiler_writes_nothing(model_folder, tmp_path, without_compiler):
    sampling = ("--seeds", "0", "--steps", "3", "--device", "cpu", "--out", tmp_path / "o")
    refused("sample", model_folder, *sampling, "compile=true", words="there is no C++ compiler")
    assert not (tmp_path / "o").exists()
    assert CliRunner().invoke(main, ["sample", str(model_folder), *map(str, sampling)]).exit_code == 0


@pytest.mark.parametrize("field", ["sample.compile=on", "sample.compile=true", "train.compile=true"])
def test_a_run_that_cannot_be_compiled_trains_nothing(field, tmp_path, without_compiler):
    arguments = ("run", write_recipe(tmp_path), field, "--out", tmp_path / "o", "--device", "cpu")
    refused(*arguments, words="cannot be compiled here")
    assert not (tmp_path / "o").exists()
    assert CliRunner().invoke(main, [*map(str, arguments), "--dry-run"]).exit_code == 0, "another machine may"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["interval=[0.2]"], "field 'interval"),
        (["budget=equal"], "budget"),
        (["shift=1e17"], "less than or equal to 100"),
    ],
)
def test_wrong_options_of_sampling_write_nothing(model_folder, tmp_path, options, words):
    device = [] if "--device" in options else ["--device", "cpu"]
    refused("sample", model_folder, "--seeds", "0", "--out", tmp_path / "o", *device, *options, words=words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("guidance", UNGUIDED)
def test_scales_of_one_do_not_guide(guidance):
    assert not SamplingConfig(guidance=guidance).guides


@pytest.mark.parametrize("guidance", [0.0, 1.5, {"semantic": 0.0}, {"semantic": 1.0, "texture": 1.5}])
def test_any_other_scale_guides(guidance):
    assert SamplingConfig(guidance=guidance).guides


def test_scales_of_one_are_sampled_as_no_guidance(finished, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["sample.guidance={semantic: 1.0}"])
    settings = recipe.sampling(finished.model.classes)
    assert settings.guidance == 1.0


def test_a_run_notes_slow_bf16_where_it_samples(finished, tmp_path, slow_cpu):
    out = tmp_path / "o"
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("samples", "metrics"))
    command = ["report", str(write_recipe(tmp_path)), "sample.precision=bf16", "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "sampling: this CPU has no bf16 instructions" in result.output


@pytest.mark.parametrize(("given", "kept"), [("on", True), ("off", False), ("auto", False), ("true", True)])
def test_earlier_values_of_compile_are_understood(given, kept, tmp_path):
    assert load_recipe(write_recipe(tmp_path), [f"sample.compile={given}"]).sample.compile is kept


def script(path: str, monkeypatch, *arguments):
    """Load a script as a module, with these arguments on its command line."""
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_unknown_figure(monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        script("docs/figures/make.py", monkeypatch, "knot").main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and "no figure 'knot'; did you mean 'knots'? (known: knots, offset" in error
