"""A stopped stage resumes with the recipe that it was started with and refuses any other."""

import shutil
import typing
from pathlib import Path

import pytest
import torch

from helpers.cli import done, refused, sfd
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

# Fields that may differ on resuming. A field in none of these lists fails a test.
FREE = {"name", "note", "published", "data.classes", "data.strict", "transformer.checkpointing"}
FREE |= {"latents.batch_size", "latents.workers", "sample.batch_size", "sample.compile"}
FREE_IN_TRAINING = {"steps", "accumulate", "compile", "workers", "checkpoint_every", "keep_checkpoints", "keep_every"}
FREE_IN_TRAINING |= {"log_every", "preview_every", "max_skipped", "data_offset"}
for training in ("texture.train", "semantic.train", "compressor.train", "train", "evaluation.classifier.training"):
    FREE |= {f"{training}.{field}" for field in FREE_IN_TRAINING}
# Paths: the content is compared, not the place; tested below.
PLACES = {"data.source", "latents.published", "compressor.folder", "evaluation.guiding_model"}
PLACES |= {f"{part}train.init" for part in ("", "texture.", "semantic.", "compressor.")}
PLACES |= {"evaluation.classifier.training.init"}
PLACES |= {f"{part}.{field}" for part in ("texture", "semantic") for field in ("folder", "pretrained")}
SAMPLES = {"samples/guided", "samples/unguided"}
# The stages whose results a section or a field changes; the longest matching name counts.
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
# Other values of fields for which `other` makes none.
OTHERS = {
    "texture.name": "convnet",
    "semantic.name": "autoencoder_kl",
    "schedule": {"name": "offset", "delta": 0.5},
    "texture.config": {"widths": [16, 32]},
    "semantic.config": {"widths": [16, 32]},
    "texture.objective": {"kl": 0.5},
    "semantic.objective": {"variance": 0.5},
}


def leaves(value, name=""):
    """Dotted names, values and types of all fields."""
    if isinstance(value, dict) and any(isinstance(inner, Settings) for inner in value.values()):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}")]
    found = []
    for field, info in type(value).model_fields.items():
        inner, path = getattr(value, field), f"{name}.{field}".lstrip(".")
        nested = isinstance(inner, Settings) or field == "streams"
        found += leaves(inner, path) if nested else [(path, inner, info.annotation)]
    return found


def other(name, value, annotation):
    """Another value of a field, valid or not: only validated recipes are compared."""
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
    """A copy of nested settings with another value of one field, unvalidated."""
    first, _, rest = name.partition(".")
    if isinstance(settings, dict):
        return settings | {first: changed(settings[first], rest, value) if rest else value}
    return settings.model_copy(update={first: changed(getattr(settings, first), rest, value) if rest else value})


def refusals(recipe, root):
    """The errors of the stages that refuse a recipe, by folder."""
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
def test_a_changed_field_is_refused_by_the_stages_whose_results_it_changes(finished, tiny, name, value, annotation):
    found = refusals(changed(tiny, name, other(name, value, annotation)), finished.folder.root)
    if name in FREE:
        assert found == {}
    else:
        sections = [section for section in CHANGES if f"{name}.".startswith(f"{section}.")]
        assert sections, f"{name} is in none of the lists"
        assert found.keys() == CHANGES[max(sections, key=len)]
        assert all(name in sentence for sentence in found.values())


def test_listed_fields_exist():
    assert {name for name, _, _ in ALL} >= FREE | PLACES


def test_a_default_written_out_changes_nothing(finished, tiny):
    same = changed(tiny, "schedule", {"name": "offset", "delta": 0.3, "leaders": ["semantic"]})
    assert refusals(same, finished.folder.root) == {}


def test_a_field_that_an_older_record_lacks_counts_as_its_default(copied, tiny):
    out = copied()
    record = files.read_json(out / "training" / "stage.json", "stage")
    del record["recipe"]["loss"]["arrived"], record["recipe"]["streams"]["semantic"]["patch_size"]
    files.write_json(out / "training" / "stage.json", record)
    pipeline.Pipeline(tiny, out, CPU).transformer.check_recipe()
    with pytest.raises(SFDError, match=r"loss.arrived was 1.0 before and is 0.8 now"):
        pipeline.Pipeline(changed(tiny, "loss.arrived", 0.8), out, CPU).transformer.check_recipe()


def stop(run, name):
    """Mark a finished stage as unfinished."""
    path = run / name / "stage.json"
    files.write_json(path, files.read_json(path, "stage") | {"finished": None})


@pytest.fixture
def stopped(copied):
    """A run that was stopped while its transformer was trained."""
    out = copied("model", "samples", "metrics")
    stop(out, "training")
    return out


def test_a_stopped_encoder_refuses_another_recipe_and_resumes_with_its_own(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    command = ["train-texture", recipe, "--out", out, "--device", "cpu", "texture.train.steps=1000000"]
    assert sfd(*command, "--max-hours", 2 / 3600).exit_code == 75
    before = (out / "recipe.yaml").read_text()
    for override, message in (
        ("data.count=600", "data.count was 240 before and is 600 now"),
        ("texture.objective={kl: 0.5}", "texture.objective.kl"),
    ):
        refused(sfd(*command, override), message)
        assert (out / "recipe.yaml").read_text() == before
    step = checkpoint.newest(out / "texture" / "checkpoints").step
    free = (f"texture.train.steps={step + 1}", "texture.train.checkpoint_every=7", "texture.train.accumulate=2")
    assert f"resuming after step {step}" in done(*command, *free)
    assert load_recipe(out / "recipe.yaml").texture.train.checkpoint_every == 7


@pytest.mark.parametrize("override", ["schedule.delta=0.5", "compressor.width=64"])
def test_a_stopped_transformer_refuses_another_recipe(stopped, tmp_path, override):
    before = (stopped / "recipe.yaml").read_text()
    command = ("train", write_recipe(tmp_path), override, "--out", stopped, "--device", "cpu")
    refused(sfd(*command), override.split("=")[0], "before")
    assert (stopped / "recipe.yaml").read_text() == before


def test_sfd_run_refuses_the_recipe_of_a_later_stage_before_training(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.folder.evaluator, out / "evaluator")
    result = sfd("run", write_recipe(tmp_path), "evaluation.classifier.shift=1", "--out", out, "--device", "cpu")
    refused(result, "evaluation.classifier.shift was 2 before and is 1 now")
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["evaluator"]


def test_encoders_in_other_folders_are_compared_by_identity(stopped, finished, tmp_path):
    given = "{name: autoencoder_kl, config: {}, train: null, folder: '%s'}"
    moved = shutil.copytree(finished.folder.texture, tmp_path / "moved")
    command = ["train", write_recipe(tmp_path), "--out", stopped, "--device", "cpu"]
    done(*command, f"texture={given % moved}")
    stop(stopped, "training")
    other = pipeline.Pipeline(load_recipe(write_recipe(tmp_path), ["seed=1"]), tmp_path / "other", CPU)
    other.texture.make()
    refused(sfd(*command, f"texture={given % other.folder.texture}"), "tokenizers.texture was")


def test_initial_weights_are_compared_by_identity(finished, copied, tmp_path):
    out, moved = copied("training", "model", "samples"), shutil.copytree(finished.folder.model, tmp_path / "moved")
    command = ["train", write_recipe(tmp_path), "--out", out, "--device", "cpu"]
    done(*command, f"train.init={finished.folder.model}")
    stop(out, "training")
    done(*command, f"train.init={moved}")
    stop(out, "training")
    refused(sfd(*command), "identity of train.init was")


def test_images_may_move_but_not_change(tmp_path, monkeypatch):
    def train(out, data):
        options = (f"data.source={data}", "evaluation.classifier=null", "--out", out, "--device", "cpu")
        return sfd("train-texture", recipe, *options)

    recipe, data = write_recipe(tmp_path), tmp_path / "photographs"
    write_folder(ShapesSource(80, 0), data)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for out in ("photographs/circle/out", "."):  # an output folder inside or around the data
        refused(train(out, "photographs"), "data.source")
    assert sorted(tmp_path.rglob("*")) == before
    assert train("out", "photographs").exit_code == 0
    stop(Path("out"), "texture")
    assert train("out", data).exit_code == 0
    assert load_recipe(Path("out/recipe.yaml")).data.source == str(data)
    stop(Path("out"), "texture")
    moved = data.rename(tmp_path / "moved")
    Path("out").rename("moved out")
    assert train("moved out", moved).exit_code == 0
    stop(Path("moved out"), "texture")
    next(moved.rglob("*.png")).unlink()
    refused(train("moved out", moved), "identity of the images in data.source")


@pytest.mark.parametrize("override", ["data.classes=1000", "texture.train.accumulate=3", "data.source=nowhere"])
def test_a_refused_first_command_leaves_nothing(tmp_path, override):
    refused(sfd("train-texture", write_recipe(tmp_path), override, "--out", tmp_path / "a" / "b", "--device", "cpu"))
    assert not (tmp_path / "a").exists()


def test_the_number_of_steps_is_fixed_once_the_decay_has_begun(copied, tmp_path):
    decay = "train: {steps: 6, decay: cosine, decay_from: 3,"
    recipe = write_recipe(tmp_path, RECIPE.replace("train: {steps: 6,", decay))
    out = copied("training", "model", "samples", "metrics")
    command = ["train", recipe, "--out", out, "--device", "cpu"]
    done(*command)
    before = (out / "recipe.yaml").read_text()
    refused(sfd(*command, "train.steps=9"), "falling since step 3", "train to step 6", "train.init")
    assert (out / "recipe.yaml").read_text() == before
    assert files.read_json(out / "training" / "stage.json", "stage")["finished"]


FOLDERS = ["export", "convert", "export-latents", "shapes"]  # commands that write a folder


@pytest.mark.parametrize("command", ["pack", "evaluate", *FOLDERS])
def test_a_command_overwrites_only_its_own_output(finished, tmp_path, command):
    samples, run = finished.folder.samples / "guided", finished.folder.root
    out, start = {
        "pack": (tmp_path / "out.npz", lambda out: ("pack", samples, out)),
        "export": (tmp_path / "out", lambda out: ("export", run, out)),
        "evaluate": (tmp_path / "out.json", lambda out: ("evaluate", samples, "--run", run, "--out", out)),
        "convert": (
            tmp_path / "out",
            lambda out: ("convert", run / "compressor/model.safetensors", out, "--heads", "4"),
        ),
        "export-latents": (tmp_path / "out", lambda out: ("export-latents", run, out)),
        "shapes": (tmp_path / "out", lambda out: ("shapes", out, "--count", 10)),
    }[command]
    if command in FOLDERS:
        shutil.copytree(finished.folder.model, out)
    else:
        out.write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    refused(sfd(*start(out)), "exists", "not overwritten")
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == before
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    if command in FOLDERS:
        out.mkdir()  # an empty one may be used
    assert sfd(*start(out)).exit_code == 0
    assert sfd(*start(out)).exit_code == (2 if command in FOLDERS else 0)


@pytest.mark.parametrize(("stage", "field"), [("texture", "texture.train.steps"), ("training", "train.steps")])
def test_a_stage_that_others_were_made_from_is_not_trained_further(finished, tiny, stage, field):
    with pytest.raises(SFDError, match=f"{stage} was trained for .*metrics"):
        pipeline.Pipeline(changed(tiny, field, 99), finished.folder.root, CPU).check_recipe()
