"""The model card: README.md of a model, written from what the model and its evaluation say of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sfd.latents import TEXTURE

MAX_CLASSES = 20  # that are listed by name
METRICS = {
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}
LOAD = {
    "sfd": 'import sfd\n\nmodel = sfd.load("{name}")\nimages = model.sample({example}seeds=[0, 1])',
    "diffusers": "import torch\nfrom diffusers import DiffusionPipeline\n\n"
    'pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)\n'
    "images = pipeline({example}generator=torch.Generator().manual_seed(0)).images",
}


def model_card(
    model: Any,
    *,
    name: str = "OWNER/NAME",
    library: Literal["sfd", "diffusers"] = "sfd",
    licence: str | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    grid: str | None = None,
) -> str:
    """Write the model card, Markdown with the hub's metadata.

    Args:
        model: the `sfd.Model` that it describes.
        name: folder or hub name, for the lines that load it.
        library: the one that loads it.
        licence: of the weights, by its identifier on the hub ("mit"); None: not stated.
        metrics: rows of the evaluation, `sfd.evaluation.evaluate.Metrics` as plain values.
        grid: file name of a picture of samples beside the card.
    """
    classes = model.classes
    tags = [f"{library}", "image-generation", "semantic-first-diffusion", "arxiv:2512.04926"]
    metadata = {"library_name": library, "pipeline_tag": "unconditional-image-generation", "tags": tags}
    if licence:
        metadata = {"license": licence, **metadata}
    example = f'"{classes[0]}", ' if classes else ""
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()) + "---",
        f"# {model.history.get('recipe') or name}",
        "An image generator by semantic-first diffusion (arXiv 2512.04926): one transformer denoises a semantic latent "
        "ahead of the texture latent that pixels are decoded from.",
        f"![samples]({grid})" if grid else "",
        f"## Use\n\n```python\n{LOAD[library].format(name=name, example=example)}\n```",
        f"## Model\n\n{_table(('', ''), _facts(model))}\n\n{_streams(model)}",
        f"## Training\n\n{_table(('', ''), model.history)}" if model.history else "",
        _metrics(metrics) if metrics else "## Metrics\n\nNot measured.",
        f"## Licence\n\n{licence or 'Not stated.'} The code that loads it has the MIT licence.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(model: Any) -> dict[str, Any]:
    classes, config = model.classes, model.transformer.config
    side = model.composite[TEXTURE].grid * model.texture.downsample
    listed = ", ".join(classes[:MAX_CLASSES]) + (" …" if len(classes) > MAX_CLASSES else "")
    return {
        "images": f"{side}×{side}",
        "classes": f"{len(classes)}: {listed}" if classes else "none, unconditional",
        "transformer": f"depth {config.depth}, width {config.width}, {config.heads} heads, "
        f"{sum(p.numel() for p in model.transformer.parameters()):,} parameters",
        "texture encoder": f"identity `{model.texture.identity}`",
        "schedule": f"`{json.dumps(model.schedule.spec)}`",
        "default sampling": model.sampling.summary(),
        "identity": f"`{model.identity}`",
    }


def _streams(model: Any) -> str:
    rows = {
        s.name: f"{s.channels} × {s.grid} × {s.grid} | {s.patch_size} | {s.tokenizer or 'unknown'}"
        for s in model.composite.streams
    }
    return _table(("stream", "latent", "patch", "tokenizer"), rows)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tables of metrics, each with its protocol, its 95 % intervals and what makes it doubtful."""
    parts = ["## Metrics"]
    for row in rows:
        protocol, found = row["protocol"], {}
        for metric, (low, high) in row["intervals"].items():
            doubt = "; ".join(row["caveats"].get(metric, ()))
            found[METRICS.get(metric, metric)] = f"{row[metric]:.3f} | {low:.3f} to {high:.3f} | {doubt}"
        sampling = ", ".join(f"{k} {v}" for k, v in row["sampling"].items() if v not in (None, "", {}))
        parts.append(
            f"**{row['name']}**, {row['n_samples']:,} images{f' ({sampling})' if sampling else ''}, against "
            f"{protocol['reference_count']:,} images of {protocol['reference']}, by {protocol['extractor_identity']}:"
        )
        parts.append(_table(("metric", "value", "95 % interval", "not reliable because of"), found))
        parts += [f"Not comparable with published numbers: {reason}." for reason in row.get("not_comparable", ())]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
