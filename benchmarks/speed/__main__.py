"""How fast sampling, training, loading and starting are, each beside a plain float32 path of the same network.

    python -m benchmarks.speed [--quick] [--only sampling,training] [--device auto] [--out runs/benchmarks/speed]

Ways that are compared run in turn (A B A B …) in one process on the same inputs; the best of several times counts, so
that a busy machine does not favour one. Prints Markdown tables and writes speed.json and speed.png. Networks have
random weights, as times do not depend on them; velocity errors are those of the demo model, which is trained.
On a GPU the larger sizes run, and guided sampling beside the published settings. docs/performance.md explains; with
--publish the tables of the sections that ran are written anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.commands import loop, solvers, start_up
from benchmarks.speed.measuring import Row, machine
from benchmarks.speed.report import PAGE, RESULTS, draw, page, table
from benchmarks.speed.sampling import errors, guided, sampling
from benchmarks.speed.training import training
from sfd.resources import choose_device


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
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description="Speed of sampling, training, loading and starting."
    )
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
