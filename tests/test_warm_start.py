"""Fine-tuning starts from every tensor that fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.dit import CLOCKS, EQUAL, configuration, inputs, random_dit
from sfd.generation.directory import model_config, model_folder
from sfd.generation.model import load_model
from sfd.latents import CompositeLatent
from sfd.models.dit import LightningDiT
from sfd.models.warm_start import inherited, warm_start
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.run.validate import planned_architecture
from sfd.utils import files
from sfd.utils.errors import SFDError
from tiny import write_recipe

CLASSES = ("ant", "bee", "cat", "dog", "elk")


def test_equal_architectures_and_classes_copy_all_weights():
    config = configuration(clocks=CLOCKS)
    source, network = random_dit(config), LightningDiT(config, seed=5)
    assert warm_start(network, source, CLASSES, CLASSES) == []
    assert torch.equal(network(*inputs(config)).velocity, source(*inputs(config)).velocity)


def test_new_classes_are_initialised_and_the_null_class_is_copied():
    source = random_dit(configuration())
    network = LightningDiT(configuration(num_classes=2), seed=5)
    before = network.class_embedding.weight.detach().clone()
    assert warm_start(network, source, ("fox", "bee"), CLASSES) == ["class fox"]
    rows = network.class_embedding.weight
    assert torch.equal(rows[0], before[0])
    assert torch.equal(rows[1], source.class_embedding.weight[1])
    assert torch.equal(rows[2], source.class_embedding.weight[5])


def test_streams_are_matched_by_name():
    source = random_dit(configuration(clocks=CLOCKS))
    network = LightningDiT(configuration(EQUAL[::-1], clocks=CLOCKS), seed=5)
    assert warm_start(network, source, CLASSES, CLASSES) == []
    x, times, labels = inputs(source.config)
    there = source(x, times, labels).velocity.split([64, 32], dim=1)
    here = network(torch.cat([x[:, 64:], x[:, :64]], dim=1), times.flip(1), labels).velocity.split([32, 64], dim=1)
    torch.testing.assert_close(here[::-1], there, rtol=1e-4, atol=1e-5)


def test_heads_that_predict_something_else_are_initialised():
    source = random_dit(configuration())
    network = LightningDiT(configuration(prediction="data"), seed=5)
    assert {name.split(".")[0] for name in warm_start(network, source, CLASSES, CLASSES)} == {"heads"}


def test_weights_without_a_source_are_initialised_and_listed():
    source = random_dit(configuration(EQUAL[:1], depth=1))
    network = LightningDiT(configuration(repa_block=1, repa_width=8, repa_channels=7), seed=5)
    fresh = warm_start(network, source, CLASSES, CLASSES)
    assert {name.split(".")[0] for name in fresh} == {"blocks", "embeddings", "heads", "projector"}
    assert all(name.startswith("blocks.1") for name in fresh if name.startswith("blocks"))


def test_a_network_of_another_width_is_refused():
    with pytest.raises(SFDError, match="width 48"):
        warm_start(LightningDiT(configuration(width=96)), random_dit(configuration()), CLASSES, CLASSES)


def test_statistics_come_from_the_source_and_tokenizers_must_agree():
    def composite(tokenizer: str, mean: float) -> CompositeLatent:
        values = {"mean": (mean,) * 4, "std": (1.0,) * 4, "tokenizer": tokenizer}
        return CompositeLatent(streams=(EQUAL[0].model_copy(update=values),))

    assert inherited(composite("a", 2.0), composite("a", 1.0)) == composite("a", 1.0)
    with pytest.raises(SFDError, match=r"tokenizer b.*those of a.*texture\.folder"):
        inherited(composite("b", 2.0), composite("a", 1.0))


def test_a_run_fine_tunes_the_model_of_another_run(finished, tmp_path):
    """By the recipe that the first run wrote, on other images; tokenizers, streams and statistics are the model's."""
    before = finished.folder
    overrides = [f"train.init={before.root}", "data.seed=7", "evaluation.classifier=null", "train.learning_rate=1.0e-9"]
    run = Pipeline(load_recipe(before.recipe, overrides), tmp_path / "out", torch.device("cpu"))
    assert [stage.name for stage in run.stages()][:2] == ["latents", "transformer"]
    run.make_model()
    old, new = load_model(before.model, torch.device("cpu")), load_model(run.folder.model, torch.device("cpu"))
    assert new.composite == old.composite
    ours, theirs = new.transformer.state_dict(), old.transformer.state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert (new.semantic.identity, new.compressor.identity) == (old.semantic.identity, old.compressor.identity)


def test_a_recipe_takes_what_it_does_not_say_from_the_model(tmp_path):
    text = "{name: tuned, data: {source: photos}, train: {init: shapes, steps: 5, batch_size: 8, learning_rate: 1e-3}}"
    recipe = load_recipe(write_recipe(tmp_path, text), ["schedule.delta=0.2", "streams.semantic.weight=1"])
    model = model_config("shapes")
    network = planned_architecture(recipe)
    assert (network.depth, network.width, network.heads, network.clocks) == (5, 128, 4, model.clocks)
    assert [(s.channels, s.grid, s.weight) for s in network.composite.streams] == [(16, 4, 1), (8, 4, 1)]
    assert recipe.schedule == {"name": "offset", "delta": 0.2, "leaders": ["semantic"]}
    tokenizers = {"texture": recipe.texture, "semantic": recipe.semantic, "compressor": recipe.compressor}
    assert {part: settings.folder for part, settings in tokenizers.items()} == {
        part: str(model_folder("shapes") / part) for part in tokenizers
    }


def test_a_second_head_of_the_model_is_trained_on(tmp_path):
    folder = shutil.copytree(model_folder("shapes"), tmp_path / "model")
    record = files.read_json(folder / "model.json", "model")
    record["transformer"]["guide_block"], record["sample"] = 3, {"guidance": 2.0, "guidance_from": "inside"}
    files.write_json(folder / "model.json", record)
    tuned = load_recipe(Path("fine-tune"), [f"train.init={folder}"])
    assert (tuned.transformer.guide_block, tuned.loss.guide, tuned.sample.guidance_from) == (3, 0.25, "inside")
    other = load_recipe(Path("fine-tune"), [f"train.init={folder}", "transformer.guide_block=null", "loss.guide=null",
                                            "sample.guidance_from=null_class"])  # fmt: skip
    assert other.transformer.guide_block is None


def test_a_model_that_cannot_encode_asks_for_its_encoders(finished, tmp_path):
    folder = shutil.copytree(finished.folder.model, tmp_path / "model")
    shutil.rmtree(folder / "semantic")
    overrides = [f"train.init={folder}"]
    with pytest.raises(SFDError, match=r"semantic\.folder.*compressor\.folder"):
        load_recipe(write_recipe(tmp_path), overrides)
    named = [f"semantic={{name: convnet, config: {{}}, train: null, folder: '{finished.folder.semantic}'}}"]
    assert load_recipe(write_recipe(tmp_path), overrides + named).compressor.folder == str(folder / "compressor")


def test_only_the_transformer_takes_initial_weights(tmp_path):
    with pytest.raises(SFDError, match=r"texture\.folder"):
        load_recipe(write_recipe(tmp_path), ["texture.train.init=models/shapes"])
