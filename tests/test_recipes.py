"""The shipped recipes: each can be planned, has the published size, and trains when shrunk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sfd.cli.export import export_model
from sfd.data.published import write_published
from sfd.data.shards import LatentSet
from sfd.generation.folder import read_images
from sfd.generation.model import load_model
from sfd.latents import CompositeLatent, Stream
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.models.semvae import SemVAE, SemVAEConfig
from sfd.run.estimate import KEPT_BYTES, describe, estimate, missing, table
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import Recipe, load_recipe
from sfd.run.validate import check, planned_compressor
from sfd.utils import files
from sfd.utils.errors import SFDError
from small_published import save_kl, save_vit

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent.parent / "recipes"
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
SHARED = {f"imagenet256/{name}.yaml" for name in ("common", "autoguidance", "guidance-b", "ablation/common")}


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / name, overrides)


def imagenet(name: str, *overrides: str) -> Recipe:
    return recipe(f"imagenet256/{name}.yaml", *overrides)


def golden_keys(name: str) -> dict:
    return json.loads((GOLDEN / f"keys_{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_can_be_planned(name):
    assert "on one device, for the transformer only, at 40% of" in describe(recipe(name), CPU)
    assert not name.startswith("imagenet256/") or name in SHARED or "fid" in recipe(name).published


def test_the_table_is_current():
    assert table({name: recipe(name) for name in sorted(NAMES, key=lambda n: (n.count("/"), n))}, 400) in (
        FOLDER / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "keys"), [("b-80", "b-1"), ("l-80", "l-1"), ("xl-80", "xl-1"), ("xxl-80", "1p0b-1")])
def test_parameters_are_those_published(name, keys):
    assert estimate(imagenet(name)).published_parameters == golden_keys(f"lightningdit-{keys}")["parameters"]


def test_parameters_of_the_semvae():
    semvae, keys = planned_compressor(imagenet("common")), golden_keys("semvae")
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in semvae.named_children()}
    assert counts == {"encoder": keys["encoder_parameters"], "decoder": keys["decoder_parameters"]}


def test_the_error_of_another_solvers_options_names_it_and_what_mends_it():
    given = ["sample.solver=dopri5", "sample.options.rtol=1e-4", "sample.solver=multistep"]
    with pytest.raises(SFDError, match=r"solver dopri5.*\(its options: order\).*sample\.options=\{\}"):
        check(recipe("shapes-demo.yaml", *given))
    check(recipe("shapes-demo.yaml", *given, "sample.options={}"))


def trained_from(recipe: Recipe) -> dict:
    return recipe.model_dump(exclude={"name", "note", "published", "sample", "evaluation"})


@pytest.mark.parametrize("name", ["xl-80", "ablation/4-offset"])
def test_recipes_of_the_whole_method_train_alike(name):
    ablations = ["loss.repa=0.5", "train.learning_rate=2e-4", "train.betas=[0.9,0.95]"] if "ablation" in name else []
    assert trained_from(imagenet(name)) == trained_from(imagenet("common", *ablations))


@pytest.mark.parametrize("name", [n for n in NAMES if re.search(r"/(ablation|offset|redi|vavae)/|own-semvae", n)])
def test_ablations_are_optimised_alike(name):
    ablation, given = imagenet("ablation/4-offset"), recipe(name)
    assert given.train == ablation.train and given.loss.repa in (ablation.loss.repa, 0)


@pytest.mark.parametrize(("name", "needed"), [("xl-80", True), ("xl-80-repa", False), ("published-latents", False)])
def test_a_semvae_is_needed_for_a_semantic_stream_that_is_encoded(name, needed):
    assert ("weights/semvae" in missing(imagenet(name))) is needed


def test_the_guiding_model_differs_in_network_and_training_alone():
    strong, weak = trained_from(imagenet("xl-80")), trained_from(imagenet("guidance-b"))
    assert {field for field in strong if strong[field] != weak[field]} == {"transformer", "train"}


def saved_bytes(network: torch.nn.Module, batch: int, composite: CompositeLatent) -> float:
    """Bytes per image that autograd keeps, without weights and tables."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(batch, composite.size), torch.rand(batch, 2), torch.zeros(batch, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / batch


def test_the_estimate_of_memory_is_what_a_block_keeps():
    streams = tuple(Stream(name=name, channels=4, grid=16) for name in ("texture", "semantic"))
    composite, width, shallow, deep = CompositeLatent(streams=streams), 96, 1, 3
    saved = []
    for depth in (shallow, deep):
        config = DiTConfig(depth=depth, width=width, heads=2, composite=composite, num_classes=3)
        saved.append(saved_bytes(LightningDiT(config), 2, composite))
    block = (saved[1] - saved[0]) / (deep - shallow)
    assert block / (256 * width) == pytest.approx(KEPT_BYTES["float32"], rel=0.02)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small encoders of the published classes, and the overrides that shrink a recipe to them."""
    folder = tmp_path_factory.mktemp("published")
    kl = {"block_out_channels": (8,) * 5, "down_block_types": ("DownEncoderBlock2D",) * 5}
    kl["up_block_types"] = ("UpDecoderBlock2D",) * 5
    save_kl(folder / "f16", latent_channels=32, **kl)
    save_kl(folder / "f8", latent_channels=4, **{field: value[:4] for field, value in kl.items()})
    save_vit(folder / "vit", "dinov2_with_registers")
    SemVAE(SemVAEConfig(input_channels=16, latent_channels=16, width=16, heads=2, blocks=1)).save(folder / "semvae")
    return folder


def shrunk(small: Path, name: str, *overrides: str) -> Recipe:
    """The recipe on the procedural data set, with small networks and few steps."""
    texture, compressor = "f8" if name.startswith("redi") else "f16", imagenet(name).compressor
    shorter = [f"compressor.{field}" for field in ("width=16", "heads=2", "blocks=1") if compressor.name == "semvae"]
    if compressor.folder is not None:
        shorter.append(f"compressor.folder={small / 'semvae'}")
    if compressor.train is not None:
        shorter += [f"compressor.train.{field}" for field in ("steps=2", "batch_size=8", "warmup=0", "decay_from=1")]
    return imagenet(
        name,
        *("data.source=shapes", "data.image_size=32", "data.count=40", "data.classes=10"),
        f"texture.pretrained={small / texture}",
        *(f"semantic.pretrained={small / 'vit'}", "semantic.config={tile: 32, grid: 2}"),
        *shorter,
        *("transformer.depth=2", "transformer.width=32", "transformer.heads=2", "transformer.repa_width=16"),
        *("train.steps=2", "train.batch_size=8", "evaluation.samples_per_class=1"),
        *overrides,
    )


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("ablation/1-base", {"texture": (32, 2)}),
        ("ablation/2-repa", {"texture": (32, 2)}),
        ("own-semvae", {"texture": (32, 2), "semantic": (16, 2)}),
        ("ablation/pca", {"texture": (32, 2), "semantic": (16, 2)}),
        ("offset/1.0", {"texture": (32, 2), "semantic": (16, 2)}),
        ("redi/synchronous", {"texture": (4, 4), "semantic": (8, 2)}),
        ("redi/offset", {"texture": (4, 4), "semantic": (8, 2)}),
    ],
)
def test_a_recipe_trains_and_samples(small, tmp_path, name, streams):
    pipeline = Pipeline(shrunk(small, name), tmp_path, CPU)
    pipeline.make_model()
    model = pipeline.model
    for composite in (check(pipeline.recipe).composite, model.composite):  # as planned, and as trained
        assert {s.name: (s.channels, s.grid) for s in composite.streams} == streams
    assert model.composite["texture"].tokenizer == pipeline.texture.encoder.identity
    assert not (tmp_path / "texture").exists() and not (tmp_path / "semantic").exists()
    made = next(model.sample_batches([0, 1], [0, 1], pipeline.recipe.sampling(model.classes)))
    assert made.images.shape == (2, 32, 32, 3) and torch.isfinite(made.latents).all()


def test_the_recipe_of_published_latents_trains(small, tmp_path):
    made = Pipeline(shrunk(small, "ablation/4-offset"), tmp_path / "made", CPU)
    made.compressor.make()
    made.latents.make()
    write_published(LatentSet(made.folder.latents), tmp_path / "shards", 20)
    overrides = ["data.source=null", f"latents.published={tmp_path / 'shards'}"]
    pipeline = Pipeline(shrunk(small, "published-latents", *overrides), tmp_path / "out", CPU)
    pipeline.make_model()
    made_images = next(pipeline.model.sample_batches([9], [0], pipeline.recipe.sampling(pipeline.model.classes))).images
    assert made_images.shape == (1, 32, 32, 3)


def test_autoguidance_end_to_end(small, tmp_path):
    Pipeline(shrunk(small, "guidance-b", "train.keep_every=1"), tmp_path / "weak", CPU).make_model()
    export_model(tmp_path / "weak", tmp_path / "guide", "sfd", "float32", None, step=1)
    names = f"evaluation.guiding_model={tmp_path / 'guide'}"
    strong = Pipeline(shrunk(small, "xl-80", names, "train.steps=6", "transformer.depth=3"), tmp_path / "strong", CPU)
    strong.make_model()
    strong.report()
    record = files.read_json(strong.folder.samples / "guided" / "samples.json", "samples")
    guide = load_model(tmp_path / "guide", CPU)
    assert record["guiding"] == guide.identity and record["sampling"]["guidance"] == 1.6
    assert read_images(strong.folder.samples / "guided", range(10)).shape == (10, 32, 32, 3)
    assert strong.folder.report.exists() and not strong.folder.evaluator.exists()


@pytest.mark.parametrize("size", ["XL", "XXL"])
def test_the_page_on_performance_has_the_estimated_memory(size):
    page = (FOLDER.parent / "docs" / "performance.md").read_text()
    shown = re.search(rf"^\| {size} ((\| \d+ )+)\|$", page, re.MULTILINE)
    ways = [(accumulate, kept) for accumulate in (1, 4) for kept in ("false", "selective", "true")]
    counted = [
        estimate(imagenet(f"{size.lower()}-80", f"train.accumulate={n}", f"transformer.checkpointing={kept}")).memory
        for n, kept in ways
    ]
    assert shown is not None
    assert [int(cell) for cell in shown[1].split("|") if cell.strip()] == [round(memory / 1e9) for memory in counted]
