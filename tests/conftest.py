"""Settings of all tests."""

from __future__ import annotations

import os
import shutil

# Before PyTorch is imported, here and in the processes that tests start: several of them, each with a thread a core,
# mostly wait for one another, and the whole suite takes twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from helpers.exact_flow import COMPOSITE, SCHEDULES, STREAMS
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.sampling import initial_noise
from sfd.schedule import build_schedule
from tiny import write_recipe

# A first call imports and warms up; how long an example takes on a busy machine is no property of the code.
settings.register_profile("sfd", deadline=None)
settings.load_profile("sfd")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole run, from images to report."""
    folder = tmp_path_factory.mktemp("run")
    pipeline = Pipeline(load_recipe(write_recipe(folder)), folder / "out", torch.device("cpu"))
    pipeline.run.save_recipe()
    pipeline.make_model()
    pipeline.report()
    return pipeline


@pytest.fixture
def copied(finished, tmp_path):
    """Copy the whole run, without the named files and folders."""

    def copy(*without):
        ignored = shutil.ignore_patterns(*without)
        return shutil.copytree(finished.folder.root, tmp_path / "copied", ignore=ignored)

    return copy


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    """Each kind of schedule of the exact flows."""
    return build_schedule(SCHEDULES[request.param], STREAMS)


@pytest.fixture
def offset():
    return build_schedule("offset", STREAMS)


@pytest.fixture
def noise():
    return initial_noise(range(8), COMPOSITE).double()
