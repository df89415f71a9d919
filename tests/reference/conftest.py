"""Options of the reference tests, their cases, and the table of relative errors at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, Row, find_cases

SHARED, SHIPPED = Path(__file__).parents[3] / "shared" / "golden", Path(__file__).parents[1] / "golden"
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption("--folder", type=Path, help="of reference cases  [default: tests/golden]")
    parser.addoption("--device", default="cpu", help="where networks compute, such as cuda or mps  [default: cpu]")


def pytest_configure(config):
    config.stash[ROWS] = []


def given_folder(config) -> Path:
    # A run of all tests reads this file too late for its options.
    return config.getoption("folder", None) or (SHARED if SHARED.is_dir() else SHIPPED)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        own = metafunc.function.__name__.removeprefix("test_")
        kinds = find_cases(given_folder(metafunc.config))
        metafunc.parametrize("case", [name for name, kind in kinds.items() if kind == own], indirect=True)


@pytest.fixture
def folder(pytestconfig) -> Path:
    return given_folder(pytestconfig)


@pytest.fixture
def rows(pytestconfig) -> list[Row]:
    return pytestconfig.stash[ROWS]


@pytest.fixture
def case(request, folder, rows):
    device = torch.device(request.config.getoption("device", None) or "cpu")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield Case(folder, request.param, device, rows)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows or not any("reference" in argument for argument in config.args):  # not amid all tests
        return
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    terminalreporter.section(f"relative errors, float32 on {config.getoption('device')}, PyTorch {torch.__version__}")
    for row in rows:
        found = "unchecked" if row.error is None else f"{row.error:8.2e}  (at most {row.tolerance:g})"
        failed = "  FAILED" if row.failed else ""
        terminalreporter.write_line(f"{row.case:{width[0]}}  {row.quantity:{width[1]}}  {found}{failed}")
