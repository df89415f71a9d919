"""Training tasks. `TASKS` lists those of the trainable encoders, by encoder name."""

from typing import Any

from sfd.training.tasks.semantic import SemanticTask
from sfd.training.tasks.texture import TextureTask

TASKS: dict[str, Any] = {"autoencoder_kl": TextureTask, "convnet": SemanticTask}
