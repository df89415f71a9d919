"""`sfd edit` draws sources and results, and refuses what it does not understand."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sfd
from helpers.random_model import random_model
from sfd.cli.main import main
from sfd.data.shapes import ShapesSource

SIDE = 4  # of the model's images; shown 24 times as large
WAYS = {
    "keep-plan": ([], 3, 3),
    "change-plan": ([], 3, 3),
    "paint": (["--brush", "0,0,0.5,0.5"], 3, 3),
    "sdedit": (["--start", "semantic=1,texture=0.3"], 3, 3),
    "swap-plans": (["--classes", "ring,star"], 1, 4),
    "interpolate": (["--classes", "ring,star"], 1, 4),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "model"
    random_model(0).save(folder)
    return folder


def run(model, *arguments):
    given = ["edit", str(model), *map(str, arguments), "--steps", "4", "--count", "2", "--device", "cpu"]
    return CliRunner().invoke(main, given)


@pytest.mark.parametrize(("way", "case"), WAYS.items(), ids=WAYS)
def test_each_way_shows_sources_and_results(model, tmp_path, way, case):
    options, rows, columns = case
    result = run(model, way, *options, "--out", tmp_path / "e.png")
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(tmp_path / "e.png"))
    assert pixels.shape[:2] == (24 * (5 * rows - 1), 24 * (5 * columns - 1))
    first = sfd.load(model, device="cpu").sample(1 if rows == 1 else 0, seeds=0, steps=4, output="array")[0]
    shown = pixels[: 24 * SIDE : 24, : 24 * SIDE : 24, :3]
    assert np.abs(shown.astype(int) - first).max() <= 1


def test_plan_guidance_is_an_option(model, tmp_path):
    pictures = {}
    for scale in ("1", "2.5", None):
        given = [] if scale is None else ["--plan-guidance", scale]
        result = run(model, "keep-plan", *given, "--classes", "star", "--out", tmp_path / f"{scale}.png")
        assert result.exit_code == 0, result.output
        pictures[scale] = (tmp_path / f"{scale}.png").read_bytes()
    assert pictures[None] == pictures["2.5"] != pictures["1"]


def test_images_are_sources_too(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    pixels = ShapesSource(3, 5).load(np.arange(3))
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(images / f"{number}.png")
    out = tmp_path / "e.png"
    result = run("shapes", "keep-plan", "--images", images, "--seeds", "0-1", "--delta", "0.5", "--out", out)
    assert result.exit_code == 0, result.output
    shown = np.asarray(Image.open(out))[::3, ::3, :3].astype(int)
    assert shown.shape == (65, 98, 3)
    assert np.abs(shown[:32, :32] - pixels[0]).mean() < 12  # as the texture encoder reconstructs it


def test_guidance_is_given_for_all_streams_or_by_stream(model, tmp_path):
    pictures = {}
    for scale in ("2", "semantic=2, texture=2", "semantic=2"):
        result = run(model, "change-plan", "--guidance", scale, "--to", "star", "--out", tmp_path / f"{scale}.png")
        assert result.exit_code == 0, result.output
        pictures[scale] = (tmp_path / f"{scale}.png").read_bytes()
    assert pictures["2"] == pictures["semantic=2, texture=2"] != pictures["semantic=2"]


REFUSED = {
    "guidance": (["keep-plan", "--guidance", "semantic=strong"], "such as semantic=1.5,texture=2"),
    "brush": (["paint", "--brush", "0.5,0,0.5,1"], "LEFT"),
    "start": (["sdedit", "--start", "early"], "early"),
    "sources": (["swap-plans"], "two sources, not 3"),
    "class": (["keep-plan", "--to", "rign"], "ring"),
}


@pytest.mark.parametrize(("arguments", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_understood_is_refused(model, tmp_path, arguments, hint):
    result = run(model, *arguments, "--out", tmp_path / "e.png")
    assert result.exit_code == 2 and hint in result.output and not (tmp_path / "e.png").exists()


def test_pictures_of_others_are_not_replaced(model, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "e.png")
    assert run(model, "keep-plan", "--out", tmp_path / "e.png").exit_code == 2
