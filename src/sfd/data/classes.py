"""Class names as people write them: with commas, in any Unicode normal form, or by number."""

from __future__ import annotations

from collections.abc import Sequence

from sfd.data.listing import nfc
from sfd.utils.errors import unknown


def find_class(given: str | int, classes: Sequence[str]) -> int:
    """Return the label of a class, given its name (in any normal form) or its number."""
    found = _find(str(given), classes)
    if found is None:
        raise unknown("class", str(given), classes)
    return found


def parse_classes(text: str, classes: Sequence[str]) -> list[int]:
    """Read classes separated by commas, which names may hold as well: the longest name that fits is taken.

    >>> parse_classes("tench, Tinca tinca, goldfish", ["goldfish", "tench, Tinca tinca"])
    [1, 0]
    """
    parts, labels = text.split(","), []
    while parts:
        for stop in range(len(parts), 0, -1):
            label = _find(",".join(parts[:stop]).strip(), classes)
            if label is not None:
                break
        else:
            raise unknown("class", parts[0].strip(), classes)
        labels.append(label)
        parts = parts[stop:]
    return labels


def _find(name: str, classes: Sequence[str]) -> int | None:
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    return next((label for label, known in enumerate(classes) if nfc(known) == nfc(name)), None)
