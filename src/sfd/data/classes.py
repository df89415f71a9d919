"""Class names as people write them: with commas, and in any Unicode normal form."""

from __future__ import annotations

from collections.abc import Sequence

from sfd.data.listing import nfc
from sfd.utils.errors import unknown


def find_class(name: str, classes: Sequence[str]) -> int:
    """Return the label of a class by its name, as written or else in the same Unicode normal form."""
    if name in classes:
        return classes.index(name)
    composed = [nfc(known) for known in classes]
    if nfc(name) not in composed:
        raise unknown("class", name, classes)
    return composed.index(nfc(name))


def parse_classes(text: str, classes: Sequence[str]) -> list[str]:
    """Read class names separated by commas, which may hold commas themselves: the longest name that fits is taken.

    >>> parse_classes("tench, Tinca tinca,goldfish", ["tench, Tinca tinca", "goldfish"])
    ['tench, Tinca tinca', 'goldfish']
    """
    known = {nfc(name): name for name in classes} | {name: name for name in classes}
    parts, found = text.split(","), []
    while parts:
        for stop in range(len(parts), 0, -1):
            name = ",".join(parts[:stop])
            match = next((known[form] for form in (name, name.strip(), nfc(name.strip())) if form in known), None)
            if match is not None:
                break
        else:
            raise unknown("class", parts[0].strip(), classes)
        found.append(match)
        parts = parts[stop:]
    return found
