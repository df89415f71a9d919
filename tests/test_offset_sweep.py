"""The sweep over Δ that docs/method.md shows, on a run that is small and already made."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from tiny import write_recipe

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "offset_sweep.py"


def test_every_offset_is_trained_once_and_judged(finished, tmp_path, monkeypatch):
    (tmp_path / "parts").symlink_to(finished.folder.root.resolve())
    arguments = [str(tmp_path), str(write_recipe(tmp_path)), "--offsets", "0,0.5", "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    spec = importlib.util.spec_from_file_location("offset_sweep", SCRIPT)
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    sweep.main()
    table = json.loads((tmp_path / "table.json").read_text())
    assert [(row["delta"], row["seed"], row["n_samples"]) for row in table["rows"]] == [(0, 3, 20), (0.5, 3, 20)]
    monkeypatch.setattr(sweep, "trained", None)  # a second time there is nothing left to train
    sweep.main()
    assert json.loads((tmp_path / "table.json").read_text()) == table
