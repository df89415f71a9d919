"""Work split by number among processes or machines, with nothing but the file system between them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from sfd.utils import distributed
from sfd.utils.errors import SFDError

Item = TypeVar("Item")


class Share(NamedTuple):
    """What one of several processes makes: every `of`-th item, from the `number`-th (counted from 1) on."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """Pick the items of this share."""
        return items[self.number - 1 :: self.of]


WHOLE = Share(1, 1)


def parse_share(text: str) -> Share:
    """Read "2/4".

    Raises:
        SFDError: it is no part of a whole.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise SFDError(f"--part {text!r} is no part; write I/N with I from 1 to N, such as 2/4")
    return Share(int(number), int(of))


def place() -> Share:
    """Give this process's share among those that a launcher started; the whole where it is alone."""
    return Share(distributed.rank() + 1, distributed.world_size())


def choose_share(part: str | None) -> Share:
    """Find this process's share: `part`, else its place among those that a launcher started, else the whole.

    Raises:
        SFDError: `part` is no part of a whole, or was given to several processes of a launcher, or a process of
            several does not know its number.
    """
    count = distributed.world_size()
    if part is None and count > 1:
        if "RANK" not in os.environ:
            raise SFDError(f"WORLD_SIZE says {count} processes, but RANK is not set; start them with torchrun")
        return place()
    if part is None:
        return WHOLE
    if count > 1:
        raise SFDError(
            f"--part {part} was given, but a launcher started {count} processes, which would all make it; leave "
            "--part out, and each makes a part of its own"
        )
    return parse_share(part)


own_device = distributed.local_device
