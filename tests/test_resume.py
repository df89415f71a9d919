"""A stopped stage resumes with the recipe that it was started with, and with no other."""

import shutil
import typing
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sfd.cli.main import main
from sfd.data.folder import write_folder
from sfd.data.shapes import ShapesSource
from sfd.run import pipeline
from sfd.run.recipe import load_recipe
from sfd.training import checkpoint
from sfd.utils import files
from sfd.utils.config import Settings
from sfd.utils.errors import SFDError
from tiny import RECIPE, write_recipe

CPU = torch.device("cpu")

# A field in none of these lists fails a test.
FREE = {"name", "note", "published", "data.classes", "data.strict", "transformer.checkpointing"}
FREE |= {"latents.batch_size", "latents.workers", "sample.batch_size", "sample.compile"}
# `data_offset` changes what comes after a failure, as its user wants.
FREE_IN_TRAINING = {"steps", "accumulate", "compile", "workers", "checkpoint_every", "keep_checkpoints", "keep_every"}
FREE_IN_TRAINING |= {"log_every", "preview_every", "max_skipped", "data_offset"}
for training in ("texture.train", "semantic.train", "compressor.train", "train", "evaluation.classifier.training"):
    FREE |= {f"{training}.{field}" for field in FREE_IN_TRAINING}
# What is there is compared, not where it is; tested below.
PLACES = {"data.source", "latents.published", "compressor.folder", "evaluation.guiding_model"}
PLACES |= {f"{part}train.init" for part in ("", "texture.", "semantic.", "compressor.")}
PLACES |= {"evaluation.classifier.training.init"}
PLACES |= {f"{part}.{field}" for part in ("texture", "semantic") for field in ("folder", "pretrained")}
SAMPLES = {"samples/guided", "samples/unguided"}
# The stages' folders that a section or a field changes by itself; the longest name that fits counts.
CHANGES = {
    "seed": {"texture", "semantic", "compressor", "training", "metrics"},
    "data": {"texture", "semantic", "compressor", "latents", "evaluator", "metrics"},
    "texture": {"texture"},
    "semantic": {"semantic"},
    "compressor": {"compressor"},
    "latents": {"latents"},
    "sample": SAMPLES | {"metrics"},
    "evaluation.samples_per_class": SAMPLES | {"metrics"},
    "evaluation.seed": SAMPLES | {"metrics"},
    "evaluation.unguided": {"metrics"},
    "evaluation.classifier": {"evaluator", "metrics"},
}
CHANGES |= {section: {"training"} for section in ("streams", "schedule", "transformer", "loss", "train")}
for guided in ("guidance", "interval", "paired", "weak_every", "weak_between"):
    CHANGES[f"sample.{guided}"] = {"samples/guided", "metrics"}
# Values that differ from the recipe's where a rule does not find one.
OTHERS = {
    "texture.name": "convnet",
    "semantic.name": "autoencoder_kl",
    "schedule": {"name": "offset", "delta": 0.5},
    "texture.config": {"widths": [16, 32]},
    "semantic.config": {"widths": [16, 32]},
    "texture.objective": {"kl": 0.5},
    "semantic.objective": {"variance": 0.5},
}


def sfd(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, *words):
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert all(word in result.output.splitlines()[-1] for word in words), result.output


def leaves(value, name=""):
    """List the dotted names of all fields, with their values and types."""
    if isinstance(value, dict) and any(isinstance(inner, Settings) for inner in value.values()):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}")]
    found = []
    for field, info in type(value).model_fields.items():
        inner, path = getattr(value, field), f"{name}.{field}".lstrip(".")
        nested = isinstance(inner, Settings) or field == "streams"
        found += leaves(inner, path) if nested else [(path, inner, info.annotation)]
    return found


def other(name, value, annotation):
    """Make another value of a field, valid or not: what is compared was validated before."""
    if name in OTHERS:
        return OTHERS[name]
    if value is None:
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0](1) if kinds[0] in (int, float, str) else (0.25, 0.5)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"another {value}"
    return value + 1 if isinstance(value, int | float) else (*value, 1) if isinstance(value, tuple) else {"another": 1}


def changed(settings, name, value):
    """Copy nested settings with another value of one field, unvalidated."""
    first, _, rest = name.partition(".")
    if isinstance(settings, dict):
        return settings | {first: changed(settings[first], rest, value) if rest else value}
    return settings.model_copy(update={first: changed(getattr(settings, first), rest, value) if rest else value})


def refusals(recipe, root):
    """Give the sentences of the stages that refuse a recipe, by folder."""
    run, found = pipeline.Pipeline(recipe, root, CPU), {}
    for stage in run.stages():
        assert (stage.folder / "stage.json").exists()
        try:
            stage.check_recipe()
        except SFDError as error:
            found[stage.folder.relative_to(root).as_posix()] = str(error)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_recipe(write_recipe(tmp_path_factory.mktemp("recipe")))


ALL = leaves(load_recipe(Path(__file__).with_name("tiny.yaml")))
FIELDS = [leaf for leaf in ALL if leaf[0] not in PLACES]


@pytest.mark.parametrize(("name", "value", "annotation"), FIELDS, ids=[field[0] for field in FIELDS])
def test_every_field_that_changes_a_result_is_refused_by_every_stage_that_it_changes(
    finished, tiny, name, value, annotation
):
    found = refusals(changed(tiny, name, other(name, value, annotation)), finished.folder.root)
    if name in FREE:
        assert found == {}
    else:
        sections = [section for section in CHANGES if f"{name}.".startswith(f"{section}.")]
        assert sections, f"{name} is listed neither as free nor under the stages that it changes"
        assert found.keys() == CHANGES[max(sections, key=len)]
        assert all(name in sentence for sentence in found.values())


def test_the_lists_name_fields_that_exist():
    assert {name for name, _, _ in ALL} >= FREE | PLACES


def test_a_default_that_is_written_out_is_no_difference(finished, tiny):
    same = changed(tiny, "schedule", {"name": "offset", "delta": 0.3, "leaders": ["semantic"]})
    assert refusals(same, finished.folder.root) == {}


def stop(run, *names):
    """Make finished stages look as if they had been stopped."""
    for name in names:
        path = run / name / "stage.json"
        files.write_json(path, files.read_json(path, "stage") | {"finished": None})


@pytest.fixture
def stopped(finished, tmp_path):
    """A run that was stopped while its transformer was trained."""
    out = tmp_path / "out"
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("model", "samples", "metrics"))
    stop(out, "training")
    return out


def test_a_texture_encoder_that_was_stopped_refuses_another_recipe_and_resumes_with_its_own(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    command = ["train-texture", recipe, "--out", out, "--device", "cpu", "texture.train.steps=1000000"]
    assert sfd(*command, "--max-hours", 2 / 3600).exit_code == 75
    before = (out / "recipe.yaml").read_text()
    for override, words in (
        ("seed=7", ("seed was 0 before and is 7 now",)),
        ("data.seed=5", ("data.seed was 0 before and is 5 now",)),
        ("data.count=600", ("data.count was 240 before and is 600 now",)),
        ("data.image_size=64", ("data.image_size was 32 before and is 64 now",)),
        ("texture.objective={kl: 0.5}", ("texture.objective.kl", "is 0.5 now")),
        ("texture.train.learning_rate=0.1", ("texture.train.learning_rate was 0.002 before and is 0.1 now",)),
    ):
        refused(sfd(*command, override), *words)
        assert (out / "recipe.yaml").read_text() == before
    step = checkpoint.newest(out / "texture" / "checkpoints").step
    free = (f"texture.train.steps={step + 1}", "texture.train.checkpoint_every=7", "texture.train.accumulate=2")
    resumed = sfd(*command, *free)
    assert resumed.exit_code == 0 and f"resuming after step {step}" in resumed.output, resumed.output
    assert load_recipe(out / "recipe.yaml").texture.train.checkpoint_every == 7


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("schedule={name: sequential}", "schedule.name"),
        ("schedule.delta=0.5", "schedule.delta"),
        ("loss.repa=0.5", "loss.repa"),
        ("streams.semantic.weight=1.0", "streams.semantic.weight"),
        ("train.learning_rate=0.1", "train.learning_rate"),
        ("seed=7", "seed"),
        ("data.seed=5", "data.seed"),
        ("compressor.width=64", "compressor.width"),
    ],
)
def test_a_transformer_that_was_stopped_refuses_another_recipe(stopped, tmp_path, override, field):
    before = (stopped / "recipe.yaml").read_text()
    refused(sfd("train", write_recipe(tmp_path), override, "--out", stopped, "--device", "cpu"), field, "before")
    assert (stopped / "recipe.yaml").read_text() == before


def test_a_whole_run_refuses_what_a_later_stage_was_started_with_before_it_trains(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder.evaluator, out / "evaluator")
    result = sfd("run", write_recipe(tmp_path), "evaluation.classifier.shift=1", "--out", out, "--device", "cpu")
    refused(result, "evaluation.classifier.shift was 2 before and is 1 now")
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["evaluator"]


def test_encoders_from_elsewhere_are_compared_by_identity(stopped, finished, tmp_path):
    given = "{name: autoencoder_kl, config: {}, train: null, folder: '%s'}"
    moved = shutil.copytree(finished.folder.texture, tmp_path / "moved")
    command = ["train", write_recipe(tmp_path), "--out", stopped, "--device", "cpu"]
    assert sfd(*command, f"texture={given % moved}").exit_code == 0
    stop(stopped, "training")
    other = pipeline.Pipeline(load_recipe(write_recipe(tmp_path), ["seed=1"]), tmp_path / "other", CPU)
    other.texture.make()
    refused(sfd(*command, f"texture={given % other.folder.texture}"), "tokenizers.texture was")


def test_weights_that_training_starts_from_are_compared_by_identity(finished, tmp_path):
    out, moved = tmp_path / "out", shutil.copytree(finished.folder.model, tmp_path / "moved")
    shutil.copytree(finished.folder.root, out, ignore=shutil.ignore_patterns("training", "model", "samples", "metrics"))
    command = ["train", write_recipe(tmp_path), "--out", out, "--device", "cpu"]
    assert sfd(*command, f"train.init={finished.folder.model}").exit_code == 0
    stop(out, "training")
    assert sfd(*command, f"train.init={moved}").exit_code == 0
    stop(out, "training")
    refused(sfd(*command), "identity of train.init was")


@pytest.fixture
def photographs(tmp_path):
    """A run of a texture encoder on a folder of images, stopped; and the recipe."""
    write_folder(ShapesSource(80, 0), tmp_path / "photographs")
    recipe = write_recipe(tmp_path, RECIPE.replace("source: shapes, count: 240", "source: photographs"))
    return recipe, tmp_path / "photographs"


def train(recipe, out, data):
    return sfd(
        "train-texture", recipe, f"data.source={data}", "evaluation.classifier=null", "--out", out, "--device", "cpu"
    )


def test_images_that_moved_resume_and_others_in_their_place_do_not(photographs, tmp_path, monkeypatch):
    recipe, data = photographs
    monkeypatch.chdir(tmp_path)
    assert train(recipe, "out", "photographs").exit_code == 0
    stop(Path("out"), "texture")
    assert train(recipe, "out", data).exit_code == 0
    assert load_recipe(Path("out/recipe.yaml")).data.source == str(data)
    stop(Path("out"), "texture")
    moved = data.rename(tmp_path / "elsewhere")
    Path("out").rename("also elsewhere")
    assert train(recipe, "also elsewhere", moved).exit_code == 0
    stop(Path("also elsewhere"), "texture")
    next(moved.rglob("*.png")).unlink()
    refused(train(recipe, "also elsewhere", moved), "identity of the images in data.source")


@pytest.mark.parametrize("out", ["photographs", "photographs/circle/out", ".", "link"])
def test_a_run_s_folder_that_mixes_with_the_data_is_refused(photographs, tmp_path, monkeypatch, out):
    recipe, data = photographs
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(data)
    before = sorted(tmp_path.rglob("*"))
    refused(train(recipe, out, "photographs"), "data.source")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "override", ["data.classes=1000", "train.accumulate=3", "data.source=nowhere", "train.warmup=9"]
)
@pytest.mark.parametrize("command", ["run", "train-texture"])
def test_a_refused_first_command_leaves_nothing(tmp_path, override, command):
    if command == "train-texture":
        override = override.replace("train.", "texture.train.", 1)
    refused(sfd(command, write_recipe(tmp_path), override, "--out", tmp_path / "a" / "b", "--device", "cpu"))
    assert not (tmp_path / "a").exists()


def test_the_number_of_steps_is_fixed_once_the_decay_has_begun(stopped, tmp_path):
    recipe = write_recipe(
        tmp_path, RECIPE.replace("train: {steps: 6,", "train: {steps: 6, decay: cosine, decay_from: 3,")
    )
    out = tmp_path / "new"
    shutil.copytree(stopped, out, ignore=shutil.ignore_patterns("training"))
    command = ["train", recipe, "--out", out, "--device", "cpu"]
    assert sfd(*command).exit_code == 0
    before = (out / "recipe.yaml").read_text()
    refused(sfd(*command, "train.steps=9"), "falling since step 3", "Train to step 6", "train.init")
    assert (out / "recipe.yaml").read_text() == before
    assert files.read_json(out / "training" / "stage.json", "stage")["finished"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.warmup=7",), ("warmup is 7 steps", "ends after 6")),
        (("train.decay=cosine", "train.decay_from=6"), ("decay_from is 6", "ends after 6")),
        (("texture.train.warmup=4",), ("texture.train", "warmup is 4")),
    ],
)
def test_a_schedule_longer_than_the_training_is_refused(tmp_path, overrides, words):
    with pytest.raises(SFDError) as refusal:
        load_recipe(write_recipe(tmp_path), overrides)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("command", ["trajectory", "pack", "export", "evaluate"])
def test_only_a_command_s_own_output_is_overwritten(finished, tmp_path, command):
    samples, run = finished.folder.samples / "guided", finished.folder.root
    out, start = {
        "trajectory": (tmp_path / "out.png", lambda out: ("trajectory", run, "--out", out, "--device", "cpu")),
        "pack": (tmp_path / "out.npz", lambda out: ("pack", samples, out)),
        "export": (tmp_path / "out", lambda out: ("export", run, out)),
        "evaluate": (tmp_path / "out.json", lambda out: ("evaluate", samples, "--run", run, "--out", out)),
    }[command]
    if command == "export":
        shutil.copytree(finished.folder.model, out)
    elif command == "trajectory":
        Image.new("RGB", (8, 8)).save(out)
    else:
        out.write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    refused(sfd(*start(out)), "exists", "not overwritten")
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == before
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert sfd(*start(out)).exit_code == 0
    assert sfd(*start(out)).exit_code == (2 if command == "export" else 0)
