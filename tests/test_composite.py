import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfd.latents import CompositeLatent, Stream
from sfd.utils.config import parse
from sfd.utils.errors import SFDError

COMPOSITE = CompositeLatent(
    streams=(
        Stream(name="texture", channels=4, grid=8, patch_size=2, mean=(1.0, 2.0, 3.0, 4.0), std=(1.0, 2.0, 3.0, 4.0)),
        Stream(name="semantic", channels=3, grid=4, weight=2.0),
    )
)


def latents(batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(batch, *s.shape, generator=generator) for s in COMPOSITE.streams}


def test_unpacked_streams_are_views():
    packed = torch.zeros(1, COMPOSITE.size)
    COMPOSITE.unpack(packed)["semantic"].fill_(1)
    assert packed.sum() == COMPOSITE["semantic"].size


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4), st.integers(1, 3))
def test_pack_inverts_unpack_for_any_number_of_streams(shapes, token_grid):
    streams = tuple(
        Stream(name=f"s{i}", channels=c, grid=token_grid * p, patch_size=p) for i, (c, p) in enumerate(shapes)
    )
    composite = CompositeLatent(streams=streams)
    packed = torch.arange(2.0 * composite.size).view(2, -1)
    assert torch.equal(composite.pack(composite.unpack(packed)), packed)


def test_streams_on_equal_grids_are_packed_as_stacked_channels():
    composite = CompositeLatent(streams=(Stream(name="a", channels=2, grid=3), Stream(name="b", channels=1, grid=3)))
    stacked = torch.randn(2, 3, 3, 3)
    packed = composite.pack({"a": stacked[:, :2], "b": stacked[:, 2:]})
    assert torch.equal(packed, stacked.flatten(1))


def test_per_entry_repeats_each_value_over_its_stream():
    expanded = COMPOSITE.per_entry(torch.tensor([[1.0, 2.0]]))
    parts = COMPOSITE.unpack(expanded)
    assert (parts["texture"] == 1).all() and (parts["semantic"] == 2).all()


def test_normalize_standardises_by_channel():
    texture = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None].expand(4, 8, 8)[None]
    normal = COMPOSITE.normalize({**latents(1), "texture": texture})
    assert (normal["texture"] == 0).all() and torch.equal(normal["semantic"], latents(1)["semantic"])


def test_denormalize_inverts_normalize():
    given_latents = latents()
    back = COMPOSITE.denormalize(COMPOSITE.normalize(given_latents))
    assert torch.allclose(back["texture"], given_latents["texture"], atol=1e-6)


def test_packing_names_a_stream_of_the_wrong_shape():
    with pytest.raises(SFDError, match=r"'semantic'.*\(3, 4, 4\).*\(3, 5, 5\)"):
        COMPOSITE.pack({**latents(), "semantic": torch.zeros(2, 3, 5, 5)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "not a multiple"),
        ({"mean": [0.0], "std": [1.0]}, "1 values for 4 channels"),
        ({"mean": [0.0] * 4, "std": [1.0, 1.0, 1.0, 0.0]}, "positive"),
    ],
)
def test_inconsistent_streams_are_refused(fields, message):
    with pytest.raises(SFDError, match=message):
        parse(Stream, {"name": "texture", "channels": 4, "grid": 8, **fields})
    streams = [{"name": "a", "channels": 1, "grid": 4}, {"name": "b", "channels": 1, "grid": 8}]
    with pytest.raises(SFDError, match="token grid"):
        parse(CompositeLatent, {"streams": streams})
