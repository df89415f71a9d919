"""Published checkpoints: their tensors under this project's names, every one accounted for."""
