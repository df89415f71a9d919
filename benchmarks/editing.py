"""What edits keep and what they change on models/shapes, where class, place and colours can be read off an image.

A network that was trained on real images, on first use, reads these factors off samples and their edits. Edits use the
null class, so that what stays is kept by the edit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import MODEL, Row, Setting
from sfd.data.images import to_tensor
from sfd.data.shapes import PATTERNS, ShapesSource
from sfd.editing import change_plan, keep_plan, sdedit
from sfd.generation.model import load_model
from sfd.models.convnet import ConvNet, ConvNetConfig
from sfd.utils import files, rng

REAL, REAL_SEED, TESTED = 20_000, 1_000_003, 2000
STEPS, BATCH = 800, 128
SAMPLES = 1000
STARTS = (0.2, 0.3, 0.4)
AHEAD = {"name": "offset", "delta": 0.5}  # the model was trained at 0.3
ROUND = ("disk", "ring")  # whose rotation cannot be seen
CLASSES, SIDE = 10, 32


class Reader(nn.Module):
    """Images (B, 3, 32, 32) to logits of class and patterns, and x, y, radius, rotation, colours in deviations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvNet(ConvNetConfig(widths=(16, 32, 96)))
        self.head = nn.Linear(96 * 4 * 4, CLASSES + 2 * len(PATTERNS) + 10)
        self.scale = nn.Parameter(torch.zeros(2, 10), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the class (B, 10), of both patterns (B, 2, 5), and the standardised factors (B, 10)."""
        out = self.head(self.body(images).flatten(1))
        shape, patterns, factors = out.split([CLASSES, 2 * len(PATTERNS), 10], dim=1)
        return shape, patterns.unflatten(1, (2, -1)), factors

    @torch.no_grad()
    def read(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Factors of uint8 images: class (B,), patterns (B, 2), place (B, 4) in image sides, colours (B, 6)."""
        parts = [self(chunk) for chunk in to_tensor(images).to(self.scale.device).split(500)]
        shape, patterns, factors = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        factors = factors * self.scale[1].cpu() + self.scale[0].cpu()
        return {
            "class": shape.argmax(1).numpy(),
            "patterns": patterns.argmax(2).numpy(),
            "place": factors[:, :4].numpy(),
            "colours": factors[:, 4:].numpy(),
        }


def truth(source: ShapesSource, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """The factors that images were rendered from, as `Reader.read` gives them; a layer has the mean of its colours."""
    known = source.factors(np.asarray(indices))
    return {
        "class": known["shape"],
        "patterns": np.stack([known[layer]["pattern"] for layer in ("figure", "ground")], 1),
        "place": np.stack([known[name] for name in ("x", "y", "radius", "rotation")], 1),
        "colours": np.concatenate([known[layer]["colours"].mean(1) for layer in ("figure", "ground")], 1),
    }


def reader(setting: Setting, steps: int) -> Reader:
    """The network that reads factors, trained on first use."""
    path = setting.out / f"reader-{setting.device.type}-{steps}.safetensors"
    with rng.seeded(0, "reader"):
        network = Reader().to(setting.device)
    if path.exists():
        network.load_state_dict(files.read_tensors(path))
        return network.eval()
    source, draw = ShapesSource(REAL, REAL_SEED), rng.generator(0, "reader")
    known = truth(source, range(REAL))
    factors = torch.from_numpy(np.concatenate([known["place"], known["colours"]], 1)).float()
    network.scale.copy_(torch.stack([factors.mean(0), factors.std(0)]))
    optimizer = torch.optim.AdamW((p for p in network.parameters() if p.requires_grad), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        chosen = draw.integers(TESTED, REAL, BATCH)
        shape, patterns, found = network(to_tensor(source.load(chosen)).to(setting.device))
        wanted = ((factors[chosen].to(setting.device) - network.scale[0]) / network.scale[1]).clamp(-3, 3)
        seen = [torch.from_numpy(known[name][chosen]).to(setting.device) for name in ("class", "patterns")]
        loss = F.cross_entropy(shape, seen[0]) + F.cross_entropy(patterns.flatten(0, 1), seen[1].flatten())
        (loss + F.mse_loss(found, wanted)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    files.write_tensors(path, network.state_dict())
    return network.eval()


def editing(setting: Setting) -> list[Row]:
    """Class, place, patterns and colours of sources and of their edits; places differ in pixels.

    Sources are samples, and real images, whose class the reader recognises. The class is kept where it finds the
    sources' class. Colours change as much as between unrelated images at a ratio of 1.
    """
    model, count = load_model(MODEL, setting.device), 60 if setting.quick else SAMPLES
    read, seeds = reader(setting, 50 if setting.quick else STEPS).read, np.arange(count)
    labels = seeds % CLASSES
    samples = model.sample(labels.tolist(), seeds=seeds.tolist(), guidance=2, output="latent")
    tested = ShapesSource(REAL, REAL_SEED)
    images = tested.load(np.arange(count))
    rows = [_row("reader, of real images", truth(tested, range(TESTED)), read(tested.load(np.arange(TESTED))))]
    right = np.flatnonzero(read(model.decode(samples))["class"] == labels)
    sources, before, of = samples[right], read(model.decode(samples[right])), seeds[right].tolist()
    fresh = [seed + 100_000 for seed in of]
    drawn = model.sample(labels[right].tolist(), seeds=fresh, guidance=2, output="array")
    rows.append(_row("other samples of the same classes", before, read(drawn)))
    plain = model.sample(labels[right].tolist(), seeds=fresh, guidance=1, output="array")
    rows.append(_row("the same without guidance", before, read(plain)))
    keep: Callable[..., Tensor] = partial(keep_plan, model, sources, fresh, plan_seeds=of)
    edits: dict[str, Callable[[], Tensor]] = {
        "plan kept": keep,
        "plan kept, no guidance": partial(keep, plan_guidance=1),
        "plan kept, no guidance, Δ = 0.5": partial(keep, plan_guidance=1, schedule=AHEAD),
        "plan kept, guided by the class instead": partial(
            keep, plan_guidance=1, classes=labels[right].tolist(), guidance=2.0
        ),
        "texture's noise kept": lambda: change_plan(model, of, fresh),
    }
    edits |= {f"SDEdit from u = {u}": partial(sdedit, model, sources, u, fresh) for u in STARTS}
    rows += [_row(name, before, read(model.decode(make()))) for name, make in edits.items()]
    seen = read(images)
    known = seen["class"] == tested.labels[:count]
    kept = keep_plan(model, model.encode(images[known]).cpu(), seeds[known].tolist())
    real = {name: values[known] for name, values in seen.items()}
    return [*rows, _row("plan of real images kept", real, read(model.decode(kept)))]


def _row(name: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Row:
    """Compare factors of pairs of images."""

    def change(other: np.ndarray) -> float:
        return float(np.abs(before["colours"] - other).mean())

    same = before["class"] == after["class"]
    turned = same & ~np.isin(before["class"], [ShapesSource(1, 0).classes.index(shape) for shape in ROUND])
    apart = np.abs(before["place"] - after["place"])
    return {
        "images": name,
        "share_of_class_kept": float(same.mean()),
        "position_pixels": float(np.hypot(*apart[:, :2].T).mean() * SIDE),
        "radius_pixels": float(apart[:, 2].mean() * SIDE),
        "rotation_degrees": float(np.degrees(apart[turned, 3].mean())),
        "share_of_patterns_kept": float((before["patterns"] == after["patterns"]).mean()),
        "ratio": change(after["colours"]) / change(np.roll(before["colours"], 7, axis=0)),
    }
