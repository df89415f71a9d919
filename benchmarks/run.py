"""How fast sampling, training, loading and starting are, each beside a plain float32 path of the same network.

    python benchmarks/run.py [--quick] [--only sampling,training] [--device auto] [--out runs/benchmarks/speed]

Ways that are compared run in turn (A B A B …) in one process on the same inputs; the best of several times counts, so
that a busy machine does not favour one. Prints Markdown tables and writes speed.json and speed.png. Networks have
random weights, as times do not depend on them; velocity errors are those of the demo model, which is trained.
On a GPU the larger sizes run, and guided sampling beside the published settings. docs/performance.md explains; with
--publish the tables of the sections that ran are written anew.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfd import flow
from sfd.guidance import VelocityField, guide
from sfd.model import load_model
from sfd.models.inference import Inference, cannot_compile
from sfd.models.transformer import SIZES, Transformer, TransformerConfig, flops
from sfd.resources import choose_device
from sfd.sampling import initial_noise, integrate
from sfd.schedules import build_schedule
from sfd.streams import Composite, Stream

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "results" / "performance.json", ROOT / "docs" / "performance.md"
COMPOSITE = Composite(
    streams=(Stream(name="texture", channels=32, grid=16), Stream(name="semantic", channels=16, grid=16, weight=2.0))
)
SCHEDULE = build_schedule({"name": "offset", "delta": 0.3}, COMPOSITE.names)
STEPS = 3  # of Euler's method in a timed sampling: what is timed is divided by it
Row = dict[str, Any]


def network(size: str) -> Transformer:
    """A network as published, none of its weights zero."""
    depth, width, heads = SIZES[size]
    config = TransformerConfig(
        depth=depth, width=width, heads=heads, composite=COMPOSITE, num_classes=1000, clocks=("semantic", "texture")
    )
    made = Transformer(config)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return made


def best_times(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way, the best of several turns; a first turn, not counted, compiles and warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in times.items()}


def machine(device: torch.device) -> Row:
    """What the figures were measured on, with the rates of its matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = best_times({"product": lambda a=a, b=b: a @ b.T}, 5, device)["product"]
        rates[name] = 2 * side**3 / seconds
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "matrix_rate": rates,
    }


def inferences(made: Transformer, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    plain = Inference(made)

    def autocast(*arguments: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return plain(*arguments)

    ways: dict[str, Callable[..., Tensor]] = {"float32": plain, "autocast": autocast, "bf16": Inference(made, "bf16")}
    if cannot_compile(device) is None:
        ways["float32 compiled"] = Inference(made, compiled=True)
        ways["bf16 compiled"] = Inference(made, "bf16", compiled=True)
    return ways


def sampling(sizes: Iterable[tuple[str, int]], repeats: int, device: torch.device) -> list[Row]:
    """Images a second through one evaluation and a step of Euler's method, for each size and batch."""
    rows = []
    for size, batch in sizes:
        made = network(size).eval().requires_grad_(False).to(device)
        noise, labels = initial_noise(range(batch), COMPOSITE).to(device), torch.arange(batch, device=device)
        how = {"solver": "euler", "steps": STEPS}
        ways = {n: partial(sampled, labelled(w, labels), noise, how) for n, w in inferences(made, device).items()}
        times = best_times(ways, repeats, device)
        for name, seconds in times.items():
            rate = batch * STEPS / seconds
            row = {"size": size, "batch": batch, "way": name, "evaluated_images_per_second": rate}
            row |= {"ratio": times["float32"] / seconds, "flops_per_second": rate * flops(made.config)}
            rows.append(row | memory(ways[name], device))
    return rows


def labelled(way: Callable[..., Tensor], labels: Tensor) -> VelocityField:
    """Give a network's velocity for these labels."""
    return lambda x, times: way(x, times, labels)


def sampled(velocity: VelocityField, noise: Tensor, how: dict[str, Any]) -> int:
    """Sample; give the evaluations spent."""
    return integrate(velocity, noise, SCHEDULE, COMPOSITE, **how).evaluations


def memory(way: Callable[[], Any], device: torch.device) -> Row:
    """Peak memory of one call, where the device can tell."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    way()
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)}


def errors(device: torch.device) -> list[Row]:
    """Relative error of the demo model's velocity along a trajectory, against float32."""
    model = load_model(ROOT / "models" / "shapes", device)
    ways = inferences(model.transformer, device)
    labels = torch.arange(64, device=device) % len(model.classes)
    visited: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        visited.append((x, times))
        return ways["float32"](x, times, labels)

    noise = initial_noise(range(64), model.composite).to(device)
    integrate(velocity, noise, model.schedule, model.composite, solver="euler", steps=12)
    rows = []
    for name, way in ways.items():
        pairs = [(way(x, t, labels), ways["float32"](x, t, labels)) for x, t in visited]
        rows.append({"way": name, "error": max(((a - b).norm() / b.norm()).item() for a, b in pairs)})
    return rows


class Training:
    """A training step on random latents, the plain way or the project's."""

    def __init__(self, made: Transformer, batch: int, device: torch.device, way: str) -> None:
        self.device, self.plain, self.bf16 = device, way == "float32", way.startswith("bf16")
        self.network = copy.deepcopy(made).train()
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.model = torch.compile(self.network) if way.endswith("compiled") else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=not self.plain)
        self.x, self.target = torch.randn(2, batch, COMPOSITE.size, device=device)
        self.times = torch.rand(batch, 2, device=device)
        self.labels = torch.arange(batch, device=device)
        self.weights = COMPOSITE.expand(torch.tensor([s.weight for s in COMPOSITE.streams], device=device))

    def __call__(self) -> None:
        """Take a step."""
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            velocity = self.model(self.x, self.times, self.labels).velocity
            loss = flow.velocity_loss(velocity, self.target, self.weights).mean()
            loss = loss + flow.cosine_loss(COMPOSITE.positions(velocity), COMPOSITE.positions(self.target)).mean()
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


def training(
    sizes: Iterable[tuple[str, int]], repeats: int, device: torch.device, matrix_rate: dict[str, float]
) -> list[Row]:
    """Images a second of whole steps; the share of what a bare matrix product in the same precision reaches."""
    names = ["float32", "bf16"] + (["bf16 compiled"] if cannot_compile(device) is None else [])
    rows = []
    for size, batch in sizes:
        made = network(size).to(device)
        ways = {name: Training(made, batch, device, name) for name in names}
        times = best_times(ways, repeats, device)
        for name, seconds in times.items():
            rate = 3 * flops(made.config) * batch / seconds
            row = {"size": size, "batch": batch, "way": name, "images_per_second": batch / seconds}
            row |= {"ratio": times["float32"] / seconds, "flops_per_second": rate}
            row["share_of_matrix_rate"] = rate / matrix_rate[name.split()[0]]
            rows.append(row | memory(ways[name], device))
    return rows


def guided(sizes: Iterable[tuple[str, int]], device: torch.device) -> list[Row]:
    """Guided sampling beside the published settings: dopri5 over the whole interval in TF32, four images at a time."""
    rows = []
    weak = network("B").eval().requires_grad_(False).to(device)
    torch.set_float32_matmul_precision("high")
    for size, batch in sizes:
        made = network(size).eval().requires_grad_(False).to(device)
        published = {"solver": "dopri5", "options": {"rtol": 1e-3, "atol": 1e-6}, "knots": False}
        ours = {"solver": "multistep", "steps": 25, "options": {}}
        for name, count, precision, how in (("published", 4, "float32", published), ("ours", batch, "bf16", ours)):
            compiled = name == "ours" and cannot_compile(device) is None
            nets = [Inference(n, precision, compiled=compiled) for n in (made, weak)]
            labels, noise = torch.arange(count, device=device), initial_noise(range(count), COMPOSITE).to(device)
            field = guide(*(labelled(n, labels) for n in nets), 1.5, COMPOSITE)
            way = partial(sampled, field, noise, how)
            seconds = best_times({name: way}, 2, device)[name]
            row = {"size": size, "way": name, "batch": count, "evaluations": way()}
            rows.append(row | {"images_per_second": count / seconds} | memory(way, device))
        rows[-1]["ratio"] = rows[-1]["images_per_second"] / rows[-2]["images_per_second"]
    torch.set_float32_matmul_precision("highest")
    return rows


def start_up(out: Path) -> list[Row]:
    """Seconds of commands, from a cold start of Python."""
    image = ["sample", str(ROOT / "models" / "shapes"), "--classes", "ring", "--seeds", "0", "--out"]
    rows = []
    for what, command in (("sfd --help", ["--help"]), ("sfd sample, one image", image)):
        times = []
        for turn in range(3):
            extra = [str(out / f"image-{time.time_ns()}-{turn}")] if command is image else []
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "sfd", *command, *extra], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        rows.append({"what": what, "seconds": min(times)})
    return rows


def loop(out: Path, steps: int) -> list[Row]:
    """The demo's training through `sfd train`: its speed, and the share of the time that it waited for batches."""
    folder = out / f"demo-{time.time_ns()}"
    few = [f"{part}.train.steps=2" for part in ("texture", "semantic", "compressor")]
    rest = ["data.count=2000", f"train.steps={steps}", f"train.log_every={steps // 4}", "train.preview_every=0"]
    recipe = str(ROOT / "recipes" / "shapes-demo.yaml")
    for command in ("train-texture", "train-semantic", "train-semvae", "prepare", "train"):
        arguments = [command, recipe, *few, *rest, "--out", str(folder), "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "sfd", *arguments], check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
    fastest = max(lines[1:], key=lambda line: line["images_per_second"])
    return [{name: fastest[name] for name in ("images_per_second", "waiting")}]


def solvers(out: Path) -> list[Row]:
    """Evaluations of each solver at equal error, on the exact velocity field of benchmarks/solvers.py."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "solvers.py"), "--out", str(out)], check=True)
    equal = json.loads((out / "solvers.json").read_text())["evaluations_at_equal_error"]
    return [
        {"method": name} | {error: None if n is None else round(n) for error, n in row.items()}
        for name, row in equal.items()
    ]


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "—"
    if name.startswith("share") or name == "waiting":
        return f"{value:.0%}"
    if name in ("ratio", "seconds"):
        return f"{value:.2f}"
    if name == "flops_per_second":
        return f"{value / 1e9:,.0f} G"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page(text: str, results: dict[str, Any]) -> str:
    """Put the tables of the results into the page, between its markers."""
    for name, rows in results.items():
        if isinstance(rows, list):
            marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
            pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
            text = re.sub(pattern, "\n".join([marks[0], table(rows), marks[1]]).replace("\\", r"\\"), text, flags=re.S)
    return text


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, section in zip(axes, ("sampling", "training"), strict=True):
        rows = results.get(section, [])
        axis.barh([f"{r['size']}, batch {r['batch']}, {r['way']}" for r in rows], [r["ratio"] for r in rows])
        axis.axvline(1, color="k", linewidth=0.8)
        axis.set(title=f"{section}: times the plain float32 path")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=90)


def measure(
    quick: bool, only: set[str], sizes: list[tuple[str, int]], repeats: int, device: torch.device, out: Path
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    results: dict[str, Any] = {"machine": machine(device)}
    rates = results["machine"]["matrix_rate"]
    sizes = sizes or ([("B", 64), ("XL", 64), ("XXL", 64)] if cuda else [("S", 4)] if quick else [("S", 8), ("B", 8)])
    sections: dict[str, Callable[[], list[Row]]] = {
        "sampling": lambda: sampling(sizes, repeats, device),
        "errors": lambda: errors(device),
        "training": lambda: training(sizes, repeats, device, rates),
        "start_up": lambda: start_up(out),
        "loop": lambda: loop(out, 40 if quick else 200),
    }
    if not quick:
        sections["solvers"] = lambda: solvers(out)
    if cuda:
        sections["guided"] = lambda: guided([("XL", 128), ("XXL", 128)], device)
    for name, section in sections.items():
        if not only or name in only:
            results[name] = section()
            torch._dynamo.reset()
            print(f"\n## {name}\n\n{table(results[name])}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of sampling, training, loading and starting.")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: some minutes on a laptop")
    parser.add_argument("--only", default="", help="sections, comma-separated: sampling, errors, training, …")
    parser.add_argument("--sizes", default="", help="of networks, and batch: S:8,B:8  [default: by device]")
    parser.add_argument("--repeats", type=int, help="turns of which the best counts  [default: 6, quick: 2]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/speed"), help="folder to write to")
    parser.add_argument("--publish", action="store_true", help="keep the results for docs/performance.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    only = {name for name in arguments.only.split(",") if name}
    repeats = arguments.repeats or (2 if arguments.quick else 6)
    pairs = [text.split(":") for text in arguments.sizes.split(",") if text]
    sizes = [(size, int(batch)) for size, batch in pairs]
    results = measure(arguments.quick, only, sizes, repeats, choose_device(arguments.device), arguments.out)
    text = json.dumps(results, indent=1) + "\n"
    (arguments.out / "speed.json").write_text(text, encoding="utf-8")
    draw(results, arguments.out / "speed.png")
    if arguments.publish:
        before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(before | results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
