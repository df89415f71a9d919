"""Training: images a second of whole steps, and their share of what bare matrix products reach."""

from __future__ import annotations

import copy

import torch

from benchmarks.speed.measuring import COMPOSITE, Row, Setting, best_times, class_labels, network
from sfd import flow
from sfd.models.dit import LightningDiT, flops
from sfd.models.inference import cannot_compile


class Training:
    """A training step on random latents, the plain way or the project's."""

    def __init__(self, made: LightningDiT, batch: int, device: torch.device, way: str) -> None:
        self.device, self.plain, self.bf16 = device, way == "float32", way.startswith("bf16")
        self.network = copy.deepcopy(made).to(device).train()
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.model = torch.compile(self.network, fullgraph=True) if way.endswith("compiled") else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=not self.plain, foreach=False)
        self.x, self.target = torch.randn(2, batch, COMPOSITE.size, device=device)
        self.times = torch.rand(batch, 2, device=device)
        self.labels = class_labels(batch, device)
        self.weights = COMPOSITE.per_entry(torch.tensor([s.weight for s in COMPOSITE.streams], device=device))

    def cut(self, batch: int) -> None:
        """Take smaller batches from now on."""
        self.x, self.target, self.times, self.labels = (
            held[:batch] for held in (self.x, self.target, self.times, self.labels)
        )

    def __call__(self) -> None:
        """Take a step."""
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            velocity = self.model(self.x, self.times, self.labels).velocity
            loss = flow.velocity_loss(velocity, self.target, self.weights).mean()
            loss = loss + flow.cosine_loss(COMPOSITE.per_position(velocity), COMPOSITE.per_position(self.target)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            pair = list(self.average.parameters()), list(self.network.parameters())
            if self.plain:
                for average, weight in zip(*pair, strict=True):
                    average.lerp_(weight, 1e-4)
            else:
                torch._foreach_lerp_(*pair, 1e-4)


def training(setting: Setting) -> list[Row]:
    """Images a second of whole steps; the share of what a bare matrix product in the same precision reaches."""
    device = setting.device
    names = ["float32", "bf16"] + (["bf16 compiled"] if cannot_compile(device) is None else [])
    rows = []
    for size, batch in setting.sizes:
        made = network(size)
        # A GPU is busy with nothing else, but three trainings of XXL at once are more than its memory holds.
        together = [[name] for name in names] if device.type == "cuda" else [names]
        times: dict[str, float] = {}
        for group in together:
            times |= best_times({name: Training(made, batch, device, name) for name in group}, setting.repeats, device)
        torch._dynamo.reset()
        for name, seconds in times.items():
            rate = 3 * flops(made.config) * batch / seconds
            row = {"size": size, "batch": batch, "way": name, "images_per_second": batch / seconds}
            row |= {"ratio": times["float32"] / seconds, "flops_per_second": rate}
            row["share_of_matrix_rate"] = rate / setting.matrix_rates[name.split()[0]]
            rows.append(row)
    return rows
