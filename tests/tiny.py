"""A recipe that runs every stage on real parts in seconds."""

from pathlib import Path

RECIPE = """
name: tiny
data: {source: shapes, count: 240, holdout: 0.5}
texture:
  name: autoencoder_kl
  config: {widths: [16, 16]}
  train: {steps: 3, batch_size: 8, learning_rate: 2.0e-3}
semantic:
  name: convnet
  train: {steps: 3, batch_size: 8, learning_rate: 2.0e-3}
compressor:
  name: semvae
  channels: 4
  width: 32
  blocks: 1
  train: {steps: 3, batch_size: 8, learning_rate: 1.0e-3}
latents: {shard_size: 50}
transformer: {size: tiny, depth: 2, width: 32, heads: 2, repa_width: 32}
train: {steps: 6, batch_size: 8, learning_rate: 1.0e-3, ema: 0.9, preview_every: 3, log_every: 2, checkpoint_every: 2}
sample: {steps: 4, guidance: 1.5}
evaluation:
  samples_per_class: 2
  classifier: {training: {steps: 3, batch_size: 8, learning_rate: 2.0e-3}}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """Write the recipe, or another, into a folder."""
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path
