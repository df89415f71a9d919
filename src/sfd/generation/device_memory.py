"""How many images are sampled at a time: as many as the device's memory holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sfd.generation.generate import DEFAULT_BATCH_SIZE, SamplingConfig, generate
from sfd.generation.model import Model
from sfd.utils.errors import SFDError
from sfd.utils.progress import console

PROBED = 2, 8  # images that are sampled, to see what each one more takes
MOST = 1024
SHARE_OF_FREE = 0.8


def fitting_batch_size(model: Model, settings: SamplingConfig, weak: Model | None, images: int) -> int:
    """Find how many images a GPU's free memory holds at a time, a power of two.

    Elsewhere, and where no more `images` are to be made than would be tried, it is `DEFAULT_BATCH_SIZE`. A few are
    sampled and thrown away, so that all that takes memory is counted; once more before, because that also makes what
    is there once, whatever the batch: weights in bf16, compiled code, the libraries' workspaces.
    """
    device = model.device
    few, more = PROBED
    if device.type != "cuda" or images <= more:
        return DEFAULT_BATCH_SIZE
    label = 0 if model.classes else model.transformer.null_class

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        list(generate(model, [label] * count, list(range(count)), settings, weak=weak))
        return torch.cuda.max_memory_allocated(device)

    try:
        peak(few)
        an_image = max(1, (peak(more) - peak(few)) // (more - few))
    except torch.cuda.OutOfMemoryError:
        return few
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return power_of_two(SHARE_OF_FREE * free / an_image)


def power_of_two(limit: float) -> int:
    """Give the largest power of two up to `limit`, but at least 1 and at most `MOST`."""
    return int(1 << (int(min(max(limit, 1), MOST)).bit_length() - 1))


class Sampler:
    """Samples batches; in pieces, each half as large as before, once a batch does not fit the device's memory."""

    def __init__(self, model: Model, settings: SamplingConfig, weak: Model | None) -> None:
        self._model, self._settings, self._weak = model, settings, weak
        self._most: int | None = None  # images that fit at a time, as far as is known

    def __call__(self, labels: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        """Sample a batch: uint8 (B, S, S, 3).

        Raises:
            SFDError: not even one image fits.
        """
        while True:
            size = min(self._most or len(seeds), len(seeds))
            settings = self._settings.model_copy(update={"batch_size": size})
            try:
                batches = generate(self._model, labels, seeds, settings, weak=self._weak)
                return np.concatenate([batch.images for batch in batches])
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise SFDError(
                        f"the memory of {self._model.device} does not hold the sampling of one image; "
                        "free some, or give another --device"
                    ) from None
            # After the exception is gone: it holds on to the tensors of the attempt.
            torch.cuda.empty_cache()
            self._most = (size + 1) // 2
            console.print(f"{size} images at a time do not fit into memory; going on with {self._most}", markup=False)
