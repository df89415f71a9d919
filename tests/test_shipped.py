"""Recipes and models that come with the project, found by name in a checkout and in the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfd
from sfd.data.shapes import ShapesSource
from sfd.run.recipe import load_recipe
from sfd.utils.errors import SFDError
from sfd.utils.shipped import find_model, find_recipe, shipped
from tiny import write_recipe

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src", "recipes", "models")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder], check=True, capture_output=True)
    (wheel,) = folder.glob("sfd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_in(folder, pattern="*"):
    return {path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file()}


def test_the_wheel_contains_modules_recipes_and_models(installed):
    package = installed / "sfd"
    for name in ("recipes", "models"):
        assert files_in(ROOT / name) == files_in(package / "shipped" / name)
    assert files_in(ROOT / "src/sfd", "*.py") == files_in(package, "*.py")
    assert (package / "py.typed").exists() and files_in(ROOT / "src/sfd", "*.html") == files_in(package, "*.html")
    assert list(installed.glob("sfd-*.dist-info/licenses/LICENSE"))


@pytest.mark.parametrize(
    "command",
    [
        "sample shapes --classes star --seeds 0 --solver euler --steps 3 --device cpu --out x",
        "run shapes-demo --dry-run --device cpu --out x",
    ],
)
def test_the_readmes_commands_run_from_the_wheel(installed, tmp_path, command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, "-m", "sfd", *command.split()], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "x/grid.png").exists() == command.startswith("sample")


@pytest.mark.parametrize("name", ["shapes-demo", "shapes-demo.yaml", "imagenet256/xl-80", "imagenet256/offset/0.3"])
def test_a_recipe_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path(name)) == load_recipe(ROOT / "recipes" / f"{name.removesuffix('.yaml')}.yaml")


def test_an_existing_path_takes_precedence_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert find_model("shapes") == Path("shapes")
    assert find_recipe("shapes") == shipped("recipe")["shapes"]  # a folder is no recipe
    write_recipe(tmp_path).rename("cifar10")
    assert find_recipe("cifar10") == Path("cifar10")
    for find, given in ((find_recipe, "./shapes-demo.yaml"), (find_recipe, "./shapes-demo"), (find_model, "./photos")):
        with pytest.raises(SFDError, match=f"there is no (recipe|model) {tmp_path}"):
            find(given)


def test_a_recipe_extends_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: shapes-demo\nseed: 7\n")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(Path("shapes-demo"), ["seed=7", "note=''"])


@pytest.mark.parametrize(
    ("find", "given", "near"), [(find_recipe, "x1-80", "imagenet256/xl-80"), (find_model, "shpaes", "mean shapes")]
)
def test_an_unknown_name_suggests_the_nearest(find, given, near):
    with pytest.raises(SFDError, match=near):
        find(given)


# The shipped model

REFERENCE = Path(__file__).parent / "helpers" / "shapes_images.npz"


@pytest.fixture(scope="module")
def model():
    return sfd.load(ROOT / "models" / "shapes", device="cpu")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("multistep-25-2.0", {"solver": "multistep", "steps": 25, "guidance": 2.0}),
        ("heun-8-2.0", {"solver": "heun", "steps": 8, "guidance": 2.0}),
        ("sde-20-2.0", {"solver": "sde", "steps": 20, "guidance": 2.0}),
        ("dopri5-None-1.0", {"solver": "dopri5"}),
    ],
)
def test_images_of_the_shipped_model_stay_the_same(model, key, settings):
    """Images of the release that the model came with, within one level per pixel."""
    images = model.sample(["star", "heart"] * 2, seeds=range(4), output="array", **settings)
    assert np.abs(images[:2].astype(int) - np.load(REFERENCE)[key]).max() <= 1


def test_the_shipped_model_encodes_images_as_in_its_training(model):
    """Latents of images it never saw have mean 0 and deviation 1 in each channel, and decode to the images."""
    images = ShapesSource(400, seed=1_000_003).load(range(400))
    latents = model.encode(images)
    for name, stream in model.composite.unpack(latents).items():
        assert stream.mean((0, 2, 3)).abs().max() < 0.15, name
        assert (stream.std((0, 2, 3)) - 1).abs().max() < 0.1, name
    assert np.abs(model.decode(latents).astype(int) - images).mean() < 8
    pictures = [Image.fromarray(image) for image in images[:3]]
    torch.testing.assert_close(model.encode(pictures), latents[:3], rtol=1e-4, atol=1e-4)


def test_the_distilled_model_draws_what_its_teacher_draws(model):
    """In four network calls, from the same noise: closer to the teacher's image than to another of its class."""
    few = sfd.load("shapes-few", device="cpu").sample("star", seeds=range(8), output="array").astype(float)
    teacher = model.sample("star", seeds=range(8), output="array", steps=24, guidance=2).astype(float)
    same, other = np.abs(few - teacher).mean((1, 2, 3)), np.abs(few - np.roll(teacher, 1, 0)).mean((1, 2, 3))
    assert np.median(same) < np.median(other) / 4, (same, other)


def test_skies_and_seas_of_photographs_are_bluer_than_forests():
    photos = sfd.load("photos", device="cpu")
    blue = {}
    for name in ("airplane", "ship", "deer", "frog"):
        images = photos.sample(name, seeds=range(12), output="array", steps=12).astype(float)
        blue[name] = np.median((images[..., 2] - images[..., 0]).mean((1, 2)))
    assert min(blue["airplane"], blue["ship"]) > max(blue["deer"], blue["frog"]) + 10
    with pytest.raises(SFDError, match="semantic"):
        photos.encode(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_bar_is_not_a_ring(model):
    """Samples of two classes differ where the shapes do: a bar covers the middle of the image, a ring does not."""
    differences = {}
    for name in ("bar", "ring"):
        images = model.sample(name, seeds=range(24), output="array", steps=12, guidance=2).astype(float)
        middle = images[:, 14:18, 14:18].mean((1, 2))
        corners = np.concatenate([images[:, :4, :4], images[:, -4:, -4:]], axis=1).mean((1, 2))
        differences[name] = np.abs(middle - corners).sum(1)
    # In most images the middle has the background's colour inside a ring, and another one inside a bar.
    assert np.median(differences["bar"]) > 2 * np.median(differences["ring"])
