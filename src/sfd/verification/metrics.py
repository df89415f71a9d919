"""Fréchet distance, inception score, precision and recall of given features; numbers, not networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfd.evaluation.metrics import frechet_distance, gaussian, inception_score, precision_recall
from sfd.verification._case import Case, References

FACTOR = 0.01  # float64 on both sides: tolerance 1e-6 by default
_NAMES = re.compile(r"(frechet_distance)|inception_score_split_(\d+)|(precision|recall)_k(\d+)")


def claims(folder: Path, name: str, values: Mapping[str, Any]) -> bool:
    """Whether a value is named as a metric."""
    return any(_NAMES.fullmatch(key) for key in values)


def check(case: Case) -> None:
    """Compute every metric that the case has a number for."""
    io = case.references()
    for quantity, value in case.values.items():
        match = _NAMES.fullmatch(quantity)
        if match:
            ours = torch.tensor(_metric(io, match), dtype=torch.float64)
            case.compare(quantity, ours, torch.tensor(case.number(quantity), dtype=torch.float64), FACTOR)
        elif not isinstance(value, str):
            case.unchecked.append(quantity)
    for stem in ("frechet_distance", "inception_score", "precision", "recall"):
        if not any(key.startswith(stem) for key in case.values):
            case.missing.append(stem)
    case.unchecked += io.never_asked()


def _metric(io: References, name: re.Match[str]) -> float:
    distance, split_size, share, neighbours = name.groups()
    if split_size:
        return inception_score(_matrix(io, "sample_probabilities"), int(split_size))
    reference, samples = _matrix(io, "reference_features"), _matrix(io, "sample_features")
    if distance:
        return frechet_distance(gaussian(reference), gaussian(samples))
    return float(getattr(precision_recall(reference, samples, int(neighbours)), share))


def _matrix(io: References, name: str) -> Tensor:
    return io.shaped(name, None, None).cpu()
