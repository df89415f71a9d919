"""Training: images per second of whole steps, and their share of the rate of bare matrix products."""

from __future__ import annotations

import copy

import torch

from benchmarks.measure import COMPOSITE, Row, Setting, best_times, class_labels, network
from sfd import flow
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import flops


class TrainingStep:
    """A training step on random latents: the plain way (`float32`) or the project's."""

    def __init__(self, net: LightningDiT, batch: int, device: torch.device, way: str) -> None:
        self.device, self.plain, self.bf16 = device, way == "float32", way.startswith("bf16")
        self.network = copy.deepcopy(net).to(device).train()
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        self.model = torch.compile(self.network, fullgraph=True) if way.endswith("compiled") else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=not self.plain, foreach=False)
        self.x, self.target = torch.randn(2, batch, COMPOSITE.size, device=device)
        self.times = torch.rand(batch, 2, device=device)
        self.labels = class_labels(batch, device)
        self.weights = COMPOSITE.per_entry(torch.tensor([s.weight for s in COMPOSITE.streams], device=device))

    def cut(self, batch: int) -> None:
        """Use smaller batches from now on."""
        for name in ("x", "target", "times", "labels"):
            setattr(self, name, getattr(self, name)[:batch])

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            velocity = self.model(self.x, self.times, self.labels).velocity
            loss = flow.velocity_loss(velocity, self.target, self.weights).mean()
            loss = loss + flow.cosine_loss(COMPOSITE.per_position(velocity), COMPOSITE.per_position(self.target)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            pair = list(self.ema.parameters()), list(self.network.parameters())
            if self.plain:
                for average, weight in zip(*pair, strict=True):
                    average.lerp_(weight, 1e-4)
            else:
                torch._foreach_lerp_(*pair, 1e-4)


def ways(setting: Setting) -> list[str]:
    """The ways to train that this machine can measure."""
    return ["float32", "bf16"] + (["bf16 compiled"] if setting.compiles else [])


def training(setting: Setting) -> list[Row]:
    """Images per second of whole steps, and the share of the rate of a matrix product in the same precision."""
    device, names, rows = setting.device, ways(setting), []
    for size, batch in setting.sizes:
        net = network(size)
        # On a GPU one after the other: three trainings of XXL are more than its memory holds.
        groups = [[name] for name in names] if device.type == "cuda" else [names]
        times: dict[str, float] = {}
        for group in groups:
            steps = {name: TrainingStep(net, batch, device, name) for name in group}
            times |= best_times(steps, setting.repeats, device)
        torch._dynamo.reset()
        for name, seconds in times.items():
            rate = 3 * flops(net.config) * batch / seconds
            row = {"size": size, "batch": batch, "way": name, "images_per_second": batch / seconds}
            row |= {"ratio": times["float32"] / seconds, "flops_per_second": rate}
            rows.append(row | {"share_of_matrix_rate": rate / setting.matrix_rates[name.split()[0]]})
    return rows
