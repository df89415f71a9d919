"""Former names of `sfd.utils.distributed.rank_slice` and `local_device`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from sfd.utils import distributed
from sfd.utils.errors import SFDError

Item = TypeVar("Item")


class Share(NamedTuple):
    """One of several equal parts of the work."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Pick the items of this share."""
        return items[self.number - 1 :: self.of]


WHOLE = Share(1, 1)


def parse_share(text: str) -> Share:
    """Read "2/4"."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise SFDError(f"--part {text!r} is no part; write I/N with I from 1 to N, such as 2/4")
    return Share(int(number), int(of))


def place() -> Share:
    """Give this rank's share."""
    return Share(distributed.rank() + 1, distributed.world_size())


def choose_share(part: str | None) -> Share:
    """Give the share that `part` names, else this rank's."""
    if part is None:
        distributed.rank_slice(())
        return place()
    if distributed.world_size() > 1:
        raise SFDError(f"--part {part} was given to {distributed.world_size()} ranks, each with its own part")
    return parse_share(part)


own_device = distributed.local_device
