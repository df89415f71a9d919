"""Recipes that use published encoders, from images to samples."""

import pytest
import torch

from sfd.models.semvae import SemVAE, SemVAEConfig
from sfd.run.estimate import describe
from sfd.run.pipeline import Pipeline
from sfd.run.recipe import load_recipe
from sfd.run.validate import check
from sfd.utils import rng
from sfd.utils.errors import SFDError
from small_published import save_kl, save_vit
from tiny import write_recipe

CPU = torch.device("cpu")
RECIPE = """
name: published
data: {{source: shapes, count: 120, holdout: 0.5}}
texture: {{name: kl, pretrained: {folder}/kl}}
semantic: {{name: vit, pretrained: {folder}/vit, config: {{tile: 16, grid: 2}}}}
compressor: {compressor}
latents: {{shard_size: 50}}
transformer: {{size: tiny, depth: 1, width: 32, heads: 2, repa_block: 1, repa_width: 32}}
train: {{steps: 3, batch_size: 8, learning_rate: 1.0e-3}}
evaluation:
  samples_per_class: 1
  classifier: {{training: {{steps: 2, batch_size: 8, learning_rate: 2.0e-3, warmup: 0}}}}
"""
PCA = "{name: pca, channels: 4, standardize: true, fit_images: 20}"
SEMVAE = "{name: semvae, channels: 5, width: 8, heads: 2, blocks: 1, folder: FOLDER/semvae}"

# A model that is not downloaded, with the architecture in the recipe.
SIZES = "{tile: 16, grid: 2, hidden_size: 16, num_attention_heads: 2}"
ABSENT = ["semantic.pretrained=facebook/none", f"semantic.config={SIZES}"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a texture autoencoder, a vision transformer and a SemVAE of its features."""
    folder = tmp_path_factory.mktemp("published")
    levels = 4  # 32×32 images to 4×4 latents
    save_kl(
        folder / "kl",
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=2,
    )
    save_vit(folder / "vit", "dinov2_with_registers")
    with rng.seeded(0, "test"):
        semvae = SemVAE(SemVAEConfig(input_channels=16, latent_channels=5, width=8, heads=2, blocks=1))
    semvae.save(folder / "semvae")
    return folder


def recipe(published, where, compressor=PCA, overrides=()):
    text = RECIPE.format(folder=published, compressor=compressor.replace("FOLDER", str(published)))
    return load_recipe(write_recipe(where, text), overrides)


def test_a_missing_published_encoder_is_found_before_training(published, tmp_path):
    changed = recipe(published, tmp_path, SEMVAE, ABSENT)
    check(changed)  # its architecture is known from the recipe
    text = describe(changed, CPU)
    assert "facebook/none is missing" in text and f"{published}/kl is missing" not in text
    with pytest.raises(SFDError, match="facebook/none is neither a folder nor"):
        Pipeline(changed, tmp_path / "out", CPU).make_model()


def test_images_smaller_than_a_tile_are_refused(published, tmp_path):
    with pytest.raises(SFDError, match=r"image_size is 32.*tiles of 256 pixels.*semantic\.config\.tile"):
        check(recipe(published, tmp_path, PCA, ["semantic.config={}", "semantic.config.tile=256"]))


class TestGivenCompressors:
    def test_its_settings_must_match_the_recipe(self, published, tmp_path):
        with pytest.raises(SFDError, match=r"semvae with width = 8, but 16 is expected"):
            check(recipe(published, tmp_path, SEMVAE, ["compressor.width=16"]))

    def test_it_must_fit_the_features(self, published, tmp_path):
        other = ["semantic={name: vit, pretrained: facebook/dinov2-base, config: {tile: 16, grid: 2}}"]
        with pytest.raises(SFDError, match=r"input_channels = 16, but 768 is expected"):
            check(recipe(published, tmp_path, SEMVAE, other))

    def test_a_missing_one_is_planned_but_cannot_be_used(self, published, tmp_path):
        given = recipe(published, tmp_path, SEMVAE, [f"compressor.folder={tmp_path}/none"])
        assert check(given).composite["semantic"].channels == 5
        with pytest.raises(SFDError, match="a compressor was expected there"):
            Pipeline(given, tmp_path / "out", CPU).make_model()

    @pytest.mark.parametrize(
        ("compressor", "message"),
        [
            ("{name: semvae, channels: 4}", "either `train` .* or `folder`"),
            ("{name: pca, train: {steps: 1, batch_size: 1, learning_rate: 1.0}}", "pca takes none"),
        ],
    )
    def test_it_is_trained_or_given(self, published, tmp_path, compressor, message):
        with pytest.raises(SFDError, match=message):
            recipe(published, tmp_path, compressor)
