from pathlib import Path

import pytest
import yaml

from sfd.run.recipe import dump_recipe, load_recipe
from sfd.utils.errors import SFDError
from tiny import RECIPE, write_recipe


def test_overrides_change_single_fields(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["train.steps=99", "schedule.delta=0.5", "loss.repa=0"])
    assert (recipe.train.steps, recipe.schedule["delta"], recipe.loss.repa) == (99, 0.5, 0)


def test_numbers_may_be_in_scientific_notation(tmp_path):
    assert load_recipe(write_recipe(tmp_path), ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4


def test_one_field_of_a_stream_leaves_the_others(tmp_path):
    streams = load_recipe(write_recipe(tmp_path), ["streams.texture.weight=1.5"]).streams
    assert (streams["texture"].weight, streams["semantic"].weight) == (1.5, 2.0)


def test_the_resolved_copy_means_the_same(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["schedule={name: sequential}"])
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe


def test_a_recipe_inherits(tmp_path):
    write_recipe(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny.yaml\nname: child\ntrain: {steps: 7}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.steps, recipe.train.batch_size) == ("child", 7, 8)


def test_published_numbers_are_not_inherited(tmp_path):
    write_recipe(tmp_path, RECIPE + "note: the tiny one\npublished: {fid: 3.03}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny.yaml\nname: child\n")
    assert load_recipe(tmp_path / "tiny.yaml").published == {"fid": 3.03}
    assert (load_recipe(child).published, load_recipe(child).note) == ({}, "")


def test_another_kind_of_part_inherits_nothing(tmp_path):
    write_recipe(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny.yaml\nschedule: {name: synchronous}\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE + "schedule: {name: offset, delta: 0.4}\n")
    assert load_recipe(child).schedule == {"name": "synchronous"}


def test_an_inherited_stream_can_be_taken_out(tmp_path):
    overrides = ["streams={texture: {}, semantic: null}", "schedule={name: synchronous}"]
    assert list(load_recipe(write_recipe(tmp_path), overrides).streams) == ["texture"]


def test_the_resolved_copy_of_a_single_stream_means_the_same(tmp_path):
    overrides = ["streams.semantic=null", "schedule={name: synchronous}", "loss.repa=0"]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe


def test_without_a_classifier_nothing_need_be_held_out(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["data.holdout=0", "evaluation.classifier=null"])
    assert recipe.evaluation.classifier is None
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe


def test_what_looks_like_a_date_is_text(tmp_path):
    assert load_recipe(write_recipe(tmp_path), ["data.source=2024-05-01"]).data.source == "2024-05-01"


def test_a_recipe_that_extends_itself_is_refused(tmp_path):
    loop = tmp_path / "loop.yaml"
    loop.write_text("extends: loop.yaml\n")
    with pytest.raises(SFDError, match="extending itself"):
        load_recipe(loop)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "'train.stepz'.*did you mean 'train.steps'"),
        (["trian.steps=3"], "'trian.steps'.*did you mean 'train.steps'"),
        (["train.steps=many"], "'train.steps'.*integer.*\"many\""),
        (["train.steps=1.5"], "'train.steps'"),
        (["train.steps=0"], "'train.steps'.*greater than 0"),
        (["seed=-1"], "'seed'.*greater than or equal to 0"),
        (["schedule={name: offset, dleta: 1}"], "did you mean 'delta'"),
        (["schedule={name: ofset}"], "did you mean 'offset'"),
        (["texture.name=autoencoder_k"], "did you mean 'autoencoder_kl'"),
        (["texture.config.patsch=2"], "did you mean 'patch'"),
        (["transformer.size=XXXL"], "no transformer size 'XXXL'"),
        (["transformer.clocks=one"], "single time"),
        (["streams={semantic: {}}"], "must hold 'texture'"),
        (["compressor.name=pca"], "pca takes none"),
        (["data.holdout=0"], "holdout is 0"),
        (["nonsense"], "is not an override"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, overrides, message):
    with pytest.raises(SFDError, match=message):
        load_recipe(write_recipe(tmp_path), overrides)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "mapping"), ("a: [", "not valid YAML"), ("\x00", "YAML")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(SFDError, match=message):
        load_recipe(write_recipe(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(SFDError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_field_is_missing(tmp_path):
    values = yaml.safe_load(RECIPE)
    del values["train"]
    with pytest.raises(SFDError, match="'train' is missing"):
        load_recipe(write_recipe(tmp_path, yaml.safe_dump(values)))


@pytest.mark.parametrize("text", ["photos #1", "#photos", "2024", "a: b", "yes"])
def test_text_is_taken_as_it_stands(text):
    assert load_recipe(Path("shapes-demo"), [f"data.source={text}"]).data.source == text


@pytest.mark.parametrize(
    "field", ["sample.budget=length", "sample.weak_every=1", "train.parallel=auto", "train.max_rollbacks=3"]
)
def test_removed_fields_of_earlier_recipes_are_read_where_they_changed_nothing(field):
    assert load_recipe(Path("shapes-demo"), [field]) == load_recipe(Path("shapes-demo"))


def test_a_renamed_field_is_read_by_its_earlier_name():
    assert load_recipe(Path("shapes-demo"), ["loss.resting=false"]).loss.stationary_streams is False


@pytest.mark.parametrize("field", ["sample.budget=equal", "sample.weak_every=2", "train.parallel=fsdp"])
def test_removed_fields_that_changed_a_result_are_refused_by_name(field):
    with pytest.raises(SFDError, match=field.partition("=")[0]):
        load_recipe(Path("shapes-demo"), [field])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("steps=200", "'train.steps' or 'sample.steps'"),
        ("lr=1", "'train.learning_rate'"),
        ("texture.lr=1", "'texture.train.learning_rate'"),
        ("batch=8", "'train.batch_size'"),
        ("sampling.guidance=2", "'sample.guidance'"),
        ("model.depth=4", "'transformer.depth'"),
        ("train.image_size=64", "'data.image_size'"),
        ("data=photos", "set one, as data.source"),
    ],
)
def test_a_wrong_field_is_answered_with_the_one_that_is_meant(given, meant):
    with pytest.raises(SFDError) as refused:
        load_recipe(Path("shapes-demo"), [given])
    assert meant in str(refused.value)


def test_a_name_alone_selects_an_encoder_a_compressor_or_a_schedule(tmp_path):
    def read(*overrides):
        return load_recipe(write_recipe(tmp_path), overrides)

    assert read("compressor=pca") == read("compressor={name: pca}")
    assert read("schedule=synchronous") == read("schedule={name: synchronous}")
    assert read("semantic=convnet") == read("compressor=semvae") == read(), "the name that it has changes nothing"
    (tmp_path / "pca.yaml").write_text("extends: tiny.yaml\ncompressor: pca\n")
    write_recipe(tmp_path).rename(tmp_path / "tiny.yaml")
    assert load_recipe(tmp_path / "pca.yaml", ["note=''"]).compressor == read("compressor=pca").compressor


@pytest.mark.parametrize("field", ["data.source", "latents.published", "train.init"])
def test_the_home_folder_is_put_for_a_tilde(field, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = ["texture.train=null", "texture.folder=~/t", "texture.config={}"] if field.startswith("latents") else []
    recipe = load_recipe(write_recipe(tmp_path), [*changes, f"{field}=~/some place"]).model_dump()
    part, last = field.split(".")
    assert recipe[part][last] == str(tmp_path / "some place")
