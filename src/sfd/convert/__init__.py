"""Published checkpoints: their tensor names and layouts to ours and back, every tensor accounted for."""
