"""Recipes: overrides, inheritance, the resolved copy, and fields of earlier versions."""

from pathlib import Path

import pytest

from sfd.run.recipe import dump_recipe, load_recipe
from sfd.run.scale import scaled
from sfd.utils.errors import SFDError
from tiny import RECIPE, write_recipe


def test_overrides_change_single_fields(tmp_path):
    overrides = ["train.steps=99", "schedule.delta=0.5", "train.learning_rate=1e-4", "streams.texture.weight=1.5"]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    assert (recipe.train.steps, recipe.schedule["delta"], recipe.train.learning_rate) == (99, 0.5, 1e-4)
    assert [recipe.streams[name].weight for name in ("texture", "semantic")] == [1.5, 2.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "'train.stepz'.*did you mean 'train.steps'"),
        (["train.steps=many"], "'train.steps'.*integer.*\"many\""),
        (["schedule={name: offset, dleta: 1}"], "did you mean 'delta'"),
        (["texture.name=autoencoder_k"], "did you mean 'autoencoder_kl'"),
        (["texture.config.patsch=2"], "did you mean 'patch'"),
        (["transformer.size=XXXL"], "no transformer size 'XXXL'"),
        (["transformer.clocks=one"], "single time"),
        (["streams={semantic: {}}"], "must hold 'texture'"),
        (["compressor.name=pca"], "pca takes none"),
        (["data.holdout=0"], "holdout is 0"),
        (["nonsense"], "is not an override"),
        (["texture={name: kl}"], "texture"),
        (["texture={name: kl, pretrained: a/b, objective: {mse: 1.0}}"], "texture"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, overrides, message):
    with pytest.raises(SFDError, match=message):
        load_recipe(write_recipe(tmp_path), overrides)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "mapping"), ("a: [", "not valid YAML"), ("\x00", "YAML")])
def test_a_file_of_another_format_is_refused(tmp_path, text, message):
    with pytest.raises(SFDError, match=message):
        load_recipe(write_recipe(tmp_path, text))


@pytest.mark.parametrize("text", ["photos #1", "#photos", "2024", "2024-05-01", "a: b", "yes"])
def test_text_fields_are_not_parsed_as_yaml(text):
    assert load_recipe(Path("shapes-demo"), [f"data.source={text}"]).data.source == text


@pytest.mark.parametrize(
    "field", ["sample.budget=length", "sample.weak_every=1", "train.parallel=auto", "train.max_rollbacks=3"]
)
def test_removed_fields_with_their_default_are_read(field):
    assert load_recipe(Path("shapes-demo"), [field]) == load_recipe(Path("shapes-demo"))


def test_a_renamed_field_is_read_by_its_earlier_name():
    assert load_recipe(Path("shapes-demo"), ["loss.resting=false"]).loss.stationary_streams is False


@pytest.mark.parametrize("field", ["sample.budget=equal", "sample.weak_every=2", "train.parallel=fsdp"])
def test_removed_fields_with_another_value_are_refused_by_name(field):
    with pytest.raises(SFDError, match=field.partition("=")[0]):
        load_recipe(Path("shapes-demo"), [field])


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule={name: sequential}"],
        ["streams.semantic=null", "schedule={name: synchronous}", "loss.repa=0"],
        ["data.holdout=0", "evaluation.classifier=null"],
    ],
)
def test_the_resolved_copy_loads_as_the_same_recipe(tmp_path, overrides):
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe
    assert ("semantic" in recipe.streams) == ("streams.semantic=null" not in overrides)


def test_a_recipe_inherits_fields_but_not_published_numbers_or_settings_of_another_kind(tmp_path):
    write_recipe(tmp_path, RECIPE + "note: tiny\npublished: {fid: 3.03}\nschedule: {name: offset, delta: 0.4}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny.yaml\nname: child\ntrain: {steps: 7}\nschedule: {name: synchronous}\n")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.train.steps, recipe.train.batch_size) == ("child", 7, 8)
    assert (recipe.published, recipe.note, recipe.schedule) == ({}, "", {"name": "synchronous"})
    child.write_text("extends: child.yaml\n")
    with pytest.raises(SFDError, match="extending itself"):
        load_recipe(child)


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
        ("evaluation.classifier=false", "or null for none"),
        ("train.betas=0.9", "should be a list"),
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


@pytest.mark.parametrize("field", ["data.source", "latents.published"])
def test_the_home_folder_is_put_for_a_tilde(field, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = ["texture.train=null", "texture.folder=~/t", "texture.config={}"] if field.startswith("latents") else []
    recipe = load_recipe(write_recipe(tmp_path), [*changes, f"{field}=~/some place"]).model_dump()
    part, last = field.split(".")
    assert recipe[part][last] == str(tmp_path / "some place")


def test_a_scaled_run_has_a_share_of_all_steps_and_samples():
    whole = load_recipe(Path("small-photos"))
    small = scaled(whole, 0.02)
    trainings = [(r.texture.train, r.semantic.train, r.compressor.train, r.train) for r in (whole, small)]
    for before, now in zip(*trainings, strict=True):
        assert now.steps == round(0.02 * before.steps) and now.warmup == round(0.02 * before.warmup)
        assert now.batch_size == before.batch_size and now.checkpoint_every == before.checkpoint_every
    assert (small.train.decay_from / small.train.steps) == (whole.train.decay_from / whole.train.steps)
    assert small.train.steps * (1 - small.train.ema) == pytest.approx(whole.train.steps * (1 - whole.train.ema))
    assert 4 <= small.evaluation.samples_per_class < whole.evaluation.samples_per_class
    assert small.name == "small-photos, scale 0.02" and (small.data, small.transformer) == (
        whole.data,
        whole.transformer,
    )


@pytest.mark.parametrize("recipe", ["shapes-demo", "cifar10", "imagenet256/xl-80"])
def test_the_smallest_scale_of_a_recipe_is_a_recipe_that_reads_back(tmp_path, recipe):
    overrides = ["data.source=shapes"] if recipe == "cifar10" else []
    small = scaled(load_recipe(Path(recipe), overrides), 1e-9)
    assert (small.train.steps, small.train.warmup, small.train.decay_from) == (1, 0, 0)
    assert load_recipe(write_recipe(tmp_path, dump_recipe(small))) == small


@pytest.mark.parametrize("scale", [0, -0.1, 1.5, float("nan")])
def test_a_scale_that_is_no_share_is_refused(scale):
    with pytest.raises(SFDError, match="above 0, up to 1"):
        scaled(load_recipe(Path("shapes-demo")), scale)
