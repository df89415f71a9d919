"""Options of the reference tests, their cases, and the table of relative errors at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import SHIPPED, Case, Row, find_cases

SHARED = Path(__file__).parents[3] / "shared" / "golden"
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption("--folder", type=Path, help=f"of reference cases  [default: {default_folder()}]")
    parser.addoption("--device", default="cpu", help="where networks compute, such as cuda or mps  [default: cpu]")


def default_folder() -> Path:
    return SHARED if SHARED.is_dir() else SHIPPED


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        # A run of all tests reads this file too late for its options.
        kinds, _, _ = find_cases(metafunc.config.getoption("folder", None) or default_folder())
        kind = metafunc.function.__name__.removeprefix("test_")
        metafunc.parametrize("case", [name for name in kinds if kinds[name] == kind], indirect=True)


@pytest.fixture(scope="session")
def folder(pytestconfig) -> Path:
    return pytestconfig.getoption("folder", None) or default_folder()


@pytest.fixture(scope="session")
def rows(pytestconfig) -> list[Row]:
    return pytestconfig.stash[ROWS]


@pytest.fixture
def case(request, folder, rows):
    # GPUs may round the factors of products to TensorFloat-32.
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield Case(folder, request.param, torch.device(request.config.getoption("device", None) or "cpu"), rows)
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows or not hasattr(config.option, "folder"):  # not amid all tests
        return
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    terminalreporter.section(f"relative errors, float32 on {config.option.device}, PyTorch {torch.__version__}")
    for row in rows:
        found = "unchecked" if row.error is None else f"{row.error:8.2e}  (at most {row.tolerance:g})"
        failed = "  FAILED" if row.failed else ""
        terminalreporter.write_line(f"{row.case:{width[0]}}  {row.quantity:{width[1]}}  {found}{failed}")
