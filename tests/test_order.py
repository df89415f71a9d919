"""The order in which training sees its images."""

import numpy as np

from sfd.training.order import EpochOrder


def test_every_epoch_shows_every_image_once():
    order = EpochOrder(seed=3, length=10)
    seen = np.concatenate([order.indices(step, range(4), 4) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_a_step_s_images_do_not_depend_on_how_it_is_divided():
    whole_batch = EpochOrder(3, 10).indices(2, range(8), 8)
    halves = [EpochOrder(3, 10).indices(2, part, 8) for part in (range(4), range(4, 8))]
    assert np.array_equal(whole_batch, np.concatenate(halves))
