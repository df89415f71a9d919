"""The one training loop: every part of the method that learns is a `Task` for `fit`."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from sfd.errors import Interrupted, SFDError
from sfd.progress import bar, console
from sfd.settings import Settings
from sfd.training import checkpoints
from sfd.training.log import TrainingLog
from sfd.weights import misfit, shapes

MAX_SKIPPED_STEPS = 10
# What may change between a run and its continuation without changing its arithmetic.
FREE_TO_CHANGE = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "preview_every"}


class TrainSettings(Settings):
    """How a task is optimised: AdamW with warm-up, clipping and an exponential moving average (EMA) of the weights."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="over all processes and accumulation steps together")
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="cosine falls to a tenth at the last step")
    decay_from: int = Field(0, ge=0, description="step at which the cosine begins")
    ema: float | None = Field(None, ge=0, lt=1, description="decay of the weights' moving average; null: none")
    ema_warmup: bool = Field(False, description="let early averages forget faster: decay min(ema, (1+step)/(10+step))")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")
    precision: Literal["float32", "bf16"] = "float32"
    accumulate: int = Field(1, gt=0, description="backward passes a step")
    checkpoint_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    log_every: int = Field(20, gt=0)
    preview_every: int = Field(0, ge=0, description="steps between sample grids; 0: none")


class Task(Protocol):
    """What is trained. `batch` and `loss` are pure, so that a run can stop anywhere and go on exactly."""

    name: str

    @property
    def model(self) -> nn.Module:
        """The network whose parameters are optimised."""
        ...

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give some slots of a step's global batch, as CPU tensors. Runs in a thread of its own, ahead of the step."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute scalars: "loss" is minimised, the others are logged."""
        ...


@runtime_checkable
class Previewing(Protocol):
    """A task that can show how far it is."""

    def preview(self, step: int, model: nn.Module, folder: Path) -> None:
        """Write pictures of the present state under `folder`."""
        ...


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Give the learning rate of a step: linear warm-up, then constant or a cosine to a tenth."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay == "constant" or step < settings.decay_from:
        return rate
    progress = (step - settings.decay_from) / max(settings.steps - settings.decay_from, 1)
    return rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def fit(task: Task, settings: TrainSettings, folder: Path, *, device: torch.device) -> nn.Module:
    """Train a task, or go on where an earlier call with the same folder stopped.

    Checkpoints go to `folder/checkpoints`, the log to `folder/log.jsonl` and `folder/tensorboard`. On a CPU with the
    same number of threads and processes, an interrupted and an uninterrupted run end with the same bytes.

    Returns:
        The trained model in evaluation mode, with the averaged weights if `settings.ema` is set.

    Raises:
        SFDError: the folder holds checkpoints of another configuration or of a later step, training diverged, or the
            disk is full.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    run = _Run(task, settings, folder, device)
    if 0 < run.step < settings.steps:
        console.print(f"{task.name}: going on after step {run.step}", markup=False, soft_wrap=True)
    with (
        run.logging(),
        bar(task.name, settings.steps, run.step) as shown,
        _stop_signal() as stop,
        run.batches() as batches,
    ):
        stopping = False
        while run.step < settings.steps and not stopping:
            note = run.advance(batches)
            shown.advance(1, note)
            if settings.preview_every and run.step % settings.preview_every == 0 and isinstance(task, Previewing):
                run.preview(task)
            stopping = bool(stop)  # a signal that comes from here on waits for the next step, or for the end
            if run.step % settings.checkpoint_every == 0 or run.step == settings.steps or stopping:
                run.save()
    if stop:
        raise Interrupted(stop[0])
    return run.result()


class _Run:
    """The state of one call of `fit`."""

    def __init__(self, task: Task, settings: TrainSettings, folder: Path, device: torch.device) -> None:
        from accelerate import Accelerator

        self.task, self.settings, self.folder, self.step, self.skipped = task, settings, folder, 0, 0
        # Precision is autocast below, not accelerate's own: its state is one a process, and parts differ in precision.
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        parts = self.accelerator.num_processes * settings.accumulate
        if settings.batch_size % parts:
            raise SFDError(
                f"batch_size {settings.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"× {settings.accumulate} accumulation steps; make it a multiple of {parts}"
            )
        self.bare = task.model.to(self.accelerator.device).train()
        optimizer = torch.optim.AdamW(
            [p for p in self.bare.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.average = copy.deepcopy(self.bare).eval().requires_grad_(False) if settings.ema is not None else None
        log_state = self._resume(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.raw_optimizer = optimizer
        self.log = TrainingLog(folder, self.step, settings.batch_size, enabled=self.accelerator.is_main_process)
        self.log.restore(log_state)

    def advance(self, batches: Iterator[dict[str, Tensor]]) -> str:
        """Take one step; give the note for the progress bar."""
        settings = self.settings
        rate = learning_rate(settings, self.step)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            batch = {k: v.to(self.accelerator.device, non_blocking=True) for k, v in next(batches).items()}
            last = part == settings.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(self.accelerator.device.type, torch.bfloat16, settings.precision == "bf16"):
                    losses = self.task.loss(self.model, batch)
                self.accelerator.backward(losses["loss"] / settings.accumulate)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / settings.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.bare.parameters(), settings.clip or math.inf)
        self._update(bool(torch.isfinite(norm)))
        self.step += 1
        totals["gradient_norm"] = norm.detach()
        if self.step % settings.log_every == 0 or self.step == settings.steps:
            return self.log.write(self.step, totals, {"learning_rate": rate, "skipped": self.skipped})
        self.log.collect(totals)
        return self.log.note

    def _update(self, finite: bool) -> None:
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self.optimizer.step()
            if self.average is not None and self.settings.ema is not None:
                warm = (1 + self.step) / (10 + self.step) if self.settings.ema_warmup else 1.0
                weight = 1 - min(self.settings.ema, warm)
                with torch.no_grad():
                    torch._foreach_lerp_(list(self.average.parameters()), list(self.bare.parameters()), weight)
        elif self.skipped >= MAX_SKIPPED_STEPS:
            alternative = " or precision: float32" if self.settings.precision != "float32" else ""
            raise SFDError(
                f"{self.task.name}: the gradient was not finite {self.skipped} steps in a row, up to step {self.step}; "
                f"start anew in another folder, with a lower learning_rate{alternative}"
            )
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def batches(self) -> Iterator[Iterator[dict[str, Tensor]]]:
        """Give this process's batches, each prepared by a thread while the one before it is being used."""
        settings, accelerator = self.settings, self.accelerator
        size = settings.batch_size // (accelerator.num_processes * settings.accumulate)
        keys = (
            (step, range(start, start + size))
            for step in range(self.step, settings.steps)
            for part in range(settings.accumulate)
            for start in [(part * accelerator.num_processes + accelerator.process_index) * size]
        )
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:

            def stream() -> Iterator[dict[str, Tensor]]:
                pending = None
                for key in keys:
                    following = pool.submit(self.task.batch, *key)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()

            try:
                yield stream()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Close the log at the end, whatever that is; a failure to do so never hides why the block failed."""
        try:
            yield
        except BaseException:
            with suppress(SFDError):
                self.log.close()
            raise
        self.log.close()

    def preview(self, task: Previewing) -> None:
        if self.accelerator.is_main_process:
            task.preview(self.step, self._shown(), self.folder / "previews")
        self.bare.train()

    def _shown(self) -> nn.Module:
        return (self.average if self.average is not None else self.bare).eval()

    def result(self) -> nn.Module:
        return self._shown()

    def save(self) -> None:
        """Write a checkpoint; one process writes, the others wait."""
        if self.accelerator.is_main_process:
            tensors = {f"model.{k}": v for k, v in self.bare.state_dict().items()}
            if self.average is not None:
                tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
            for index, state in self.raw_optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
            record = {
                "task": self.task.name,
                "settings": self.settings.model_dump(mode="json"),
                "skipped": self.skipped,
                "log": self.log.state(),
            }
            checkpoints.save(self.folder / "checkpoints", self.step, tensors, record, self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        checkpoint = checkpoints.newest(self.folder / "checkpoints")
        if checkpoint is None:
            return {}
        self._check_same_run(checkpoint.record)
        if checkpoint.step > self.settings.steps:
            raise SFDError(
                f"{self.folder} holds a run of {checkpoint.step} steps, but {self.settings.steps} were asked for; "
                f"ask for {checkpoint.step} or more, or use another folder to train for fewer"
            )
        for model, prefix in ((self.bare, "model"), (self.average, "average")):
            if model is not None:
                _load(model, checkpoint.group(prefix), self.folder)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.group("optimizer").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.skipped = checkpoint.step, int(checkpoint.record["skipped"])
        return dict(checkpoint.record["log"])

    def _check_same_run(self, record: dict[str, Any]) -> None:
        then, now = record["settings"], self.settings.model_dump(mode="json")
        # The length of a run enters the arithmetic through the cosine, and so only once that has begun.
        decaying = now["decay"] == "cosine" and record["step"] > now["decay_from"]
        free = FREE_TO_CHANGE - {"steps"} if decaying else FREE_TO_CHANGE
        for field in now.keys() - free:
            if then.get(field) != now[field]:
                raise SFDError(
                    f"{self.folder} holds a run with {field} = {then.get(field)!r}, but {now[field]!r} was given; "
                    "use another folder, or the settings that the run was started with"
                )


def _load(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    differences = misfit(tensors, shapes(model))
    if differences:
        raise SFDError(
            f"the checkpoint in {folder} is of another configuration ({differences}); use another folder, or the "
            "recipe that the run was started with"
        )
    model.load_state_dict(tensors)


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is never left half done; a second one stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
