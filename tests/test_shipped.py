"""What comes with the project: found by name in a checkout, and by someone who has only the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sfd.run.recipe import load_recipe
from sfd.utils.errors import SFDError
from sfd.utils.shipped import find_model, find_recipe, shipped
from tiny import write_recipe

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src", "recipes", "models")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked as pip does."""
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


def test_the_wheel_holds_what_commands_need(installed):
    package = installed / "sfd"
    for name in ("recipes", "models"):
        ours = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        assert ours == {
            path.relative_to(package / "shipped" / name)
            for path in (package / "shipped" / name).rglob("*")
            if path.is_file()
        }
    modules = {path.relative_to(ROOT / "src") for path in (ROOT / "src/sfd").rglob("*.py")}
    assert modules == {path.relative_to(installed) for path in package.rglob("*.py")}
    assert (package / "py.typed").exists() and (package / "evaluation/report.html").exists()
    assert list(installed.glob("sfd-*.dist-info/licenses/LICENSE"))


@pytest.mark.parametrize(
    "command",
    [
        "sample shapes --classes star --seeds 0 --solver euler --steps 3 --device cpu --out x",
        "run shapes-demo --dry-run --device cpu --out x",
    ],
)
def test_the_wheel_alone_serves_the_readme_s_commands(installed, tmp_path, command):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run([sys.executable, "-m", "sfd", *command.split()], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "x/grid.png").exists() == command.startswith("sample")


@pytest.mark.parametrize("name", ["shapes-demo", "shapes-demo.yaml", "imagenet256/xl-80", "imagenet256/offset/0.3"])
def test_a_recipe_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path(name)) == load_recipe(ROOT / "recipes" / f"{name.removesuffix('.yaml')}.yaml")


def test_a_file_or_folder_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert find_model("shapes") == Path("shapes")
    assert find_recipe("shapes") == shipped("recipe")["shapes"]  # a folder is no recipe
    write_recipe(tmp_path).rename("cifar10")
    assert find_recipe("cifar10") == Path("cifar10")


def test_a_recipe_extends_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: shapes-demo\nseed: 7\n")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(Path("shapes-demo"), ["seed=7", "note=''"])


@pytest.mark.parametrize(
    ("find", "given", "near"), [(find_recipe, "x1-80", "imagenet256/xl-80"), (find_model, "shape", "shapes")]
)
def test_an_unknown_name_lists_the_nearest(find, given, near):
    with pytest.raises(SFDError, match=near):
        find(given)
