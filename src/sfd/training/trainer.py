"""The one training loop: every part of the method that learns is a `Task` for `fit`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfd.training import checkpoint
from sfd.training.batches import Batches, drawn_step, parts, workers
from sfd.training.config import TrainSettings, average_weight, learning_rate
from sfd.training.guards import LOOK_EVERY, Guard, backward, examination
from sfd.training.log import TrainingLog
from sfd.training.parallel import Parallel, check, local, whole
from sfd.utils import distributed, files
from sfd.utils.config import first_difference
from sfd.utils.device import slow_bf16
from sfd.utils.errors import Interrupted, SFDError
from sfd.utils.progress import bar, console
from sfd.utils.signals import requests
from sfd.utils.transfer import sent

REPORT = "failure-report.json"
# Device types whose fused AdamW takes no notice of `found_inf` (https://github.com/pytorch/pytorch/pull/186360).
BLIND = {"mps"}


class Task(Protocol):
    """What is trained. `batch` and `loss` are pure, so that a run can stop anywhere and go on exactly."""

    name: str

    @property
    def model(self) -> nn.Module:
        """The network whose parameters are optimised."""
        ...

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give some slots of a step's global batch, as CPU tensors. Runs ahead of the step, in several threads at once.

        `indices`, if there, says which images they are. After a rollback steps are asked for that lie far ahead.
        """
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute scalars: "loss" is minimised, the others are logged, as may be pairs (sum, count)."""
        ...


@runtime_checkable
class Previewing(Protocol):
    """A task that can show how far it is."""

    def preview(self, step: int, model: nn.Module, folder: Path) -> None:
        """Write pictures of the present state under `folder`."""
        ...


def fit(task: Task, settings: TrainSettings, folder: str | Path, *, device: str | torch.device) -> nn.Module:
    """Train a task, or go on where an earlier call with the same folder stopped.

    Checkpoints go to `folder/checkpoints`, the log to `folder/log.jsonl` and `folder/tensorboard`. On a CPU with the
    same number of threads and processes, an interrupted and an uninterrupted run end with the same bytes. Where there
    are several processes (`sfd.utils.distributed`), all call this; each takes its part of every batch.

    Returns:
        The trained model in evaluation mode, with the averaged weights if `settings.ema` is set.

    Raises:
        SFDError: the folder holds checkpoints of another configuration or of a later step, training diverged, or the
            disk is full, or the device's memory does not hold a step.
        Interrupted: a signal to stop came, or the time of `--max-hours` was over; the state is saved.
    """
    folder, device = Path(folder), torch.device(device)
    if distributed.world_size() > 1 and distributed.company() is None:
        raise SFDError("a launcher started several processes; call sfd.utils.distributed.init(device) before fit")
    if settings.precision == "bf16" and (slowness := slow_bf16(device)):
        console.print(f"{task.name}: {slowness}", style="yellow", markup=False, soft_wrap=True)
    with _explaining_memory(task, settings, device):
        return _trained(task, settings, folder, device)


def _trained(task: Task, settings: TrainSettings, folder: Path, device: torch.device) -> nn.Module:
    run = Run(task, settings, folder, device)
    if 0 < run.step < settings.steps:
        console.print(f"{task.name}: going on after step {run.step}", markup=False, soft_wrap=True)
    reason = 0
    with run.closing(), bar(task.name, settings.steps, run.step) as shown, requests() as received:
        run.begin()
        while run.step < settings.steps and not reason:
            note = run.advance()
            shown.reach(run.step, note)
            if settings.preview_every and run.step % settings.preview_every == 0 and isinstance(task, Previewing):
                run.preview(task)
            # A signal that comes from here on waits for the next step, or for the end.
            reason = distributed.all_reduce_max(received[0] if received else 0)
            if settings.regular(run.step) or run.step == settings.steps or reason:
                run.save()
        run.finish()
    reason = distributed.all_reduce_max(received[0] if received else 0)
    if reason:
        raise Interrupted(reason)
    return run.result()


@contextmanager
def _explaining_memory(task: Task, settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Say what to do where a step does not fit a GPU; a launcher that started it again would change nothing."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = settings.batch_size // parts(settings)
        raise SFDError(
            f"{task.name}: the memory of {device} does not hold a step with {size} images at a time "
            f"({str(error).split('. ')[0]}); divide the batch further with a larger `train.accumulate` than "
            f"{settings.accumulate}, or keep less of it with `transformer.checkpointing` (selective or true)"
        ) from None


class Run:
    """The state of one call of `fit`."""

    def __init__(self, task: Task, settings: TrainSettings, folder: Path, device: torch.device) -> None:
        check(settings, device)
        self.task, self.settings, self.folder, self.device = task, settings, folder, device
        self.parallel = Parallel(task.model, settings.parallel, device, compiled=settings.compile)
        self.network = self.parallel.network
        self.average = self.parallel.average() if settings.ema is not None else None
        self.optimizer = _optimizer(self.network, settings)
        self.guard, self.log = Guard(device), TrainingLog(folder, settings.batch_size)
        pinned = device.type == "cuda"
        self.batches = Batches(task.batch, settings, threads=workers(settings, device), pinned=pinned)
        self.writer = checkpoint.Writer(folder / "checkpoints", settings, sharded=self.parallel.sharded)
        self.step, self.attempt, self.pause = 0, 0, 0.0
        self._saved: int | None = None  # the step of the checkpoint that this state was saved to or came from
        self._log_state: dict[str, Any] = {}
        self._resume()

    def begin(self) -> None:
        """Open the log and start on the batches; a new run shows at once that its checkpoints can be written."""
        self.log.start(self.step, self._log_state)
        self.save()
        self.batches.start(self.step, self.attempt)

    def advance(self) -> str:
        """Take one step; give the note for the progress bar."""
        settings = self.settings
        self.writer.check()
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in range(settings.accumulate):
            losses = self._backward(self.batches.next(), part == settings.accumulate - 1)
            self.log.collect(losses, 1 / parts(settings))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip or math.inf))
        self.log.collect({"gradient_norm": norm}, 1 / distributed.world_size())
        self._update(self.guard.observe(norm))
        self.step += 1
        last = self.step == settings.steps
        if (self.step % LOOK_EVERY == 0 or last) and self._failed():
            self._roll_back()
            return "rolled back"
        note = self.log.step()
        return self._write_line(rate) if self.step % settings.log_every == 0 or last else note

    def _backward(self, batch: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """Add a part's gradient; give its losses."""
        batch = {k: sent(v, self.device) for k, v in batch.items()}
        with self.parallel.accumulating(last):
            with torch.autocast(self.device.type, torch.bfloat16, self.settings.precision == "bf16"):
                losses = self.task.loss(self.parallel.model, batch)
            backward(losses["loss"], 1 / self.settings.accumulate)
        return losses

    def _update(self, skip: Tensor) -> None:
        """Move the weights, unless `skip` is 1; the average moves towards where they are."""
        blind = self.device.type in BLIND
        self.optimizer.found_inf = None if blind else skip  # type: ignore[attr-defined]
        if not (blind and bool(skip)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            with torch.no_grad():
                weights, average = local(self.network.parameters()), local(self.average.parameters())
                torch._foreach_lerp_(average, weights, average_weight(self.settings, self.step))

    def _write_line(self, rate: float) -> str:
        extra = {"learning_rate": rate, "skipped": int(self.guard.total), "rollbacks": self.attempt}
        extra["waiting"] = self.batches.waiting()
        if self.average is not None:
            with torch.no_grad():
                weights, average = local(self.network.parameters()), local(self.average.parameters())
                distance = self.parallel.norm(a - w for a, w in zip(average, weights, strict=True))
                extra["ema_distance"] = float(distance / self.parallel.norm(weights))
        if self.pause:
            extra["checkpoint_pause"], self.pause = self.pause, 0.0
        return self.log.write(self.step, extra)

    def _failed(self) -> bool:
        return self.guard.state()["most"] >= min(self.settings.max_skipped, self.settings.steps)

    def _roll_back(self) -> None:
        """Go back to the last good checkpoint, with another order of the data from there.

        A run that is killed before its next checkpoint fails once more in the same way and comes back here.

        Raises:
            SFDError: it was done often enough; a report is written.
        """
        self.writer.wait()
        failed = self.step
        good = checkpoint.newest(self.folder / "checkpoints", good=True)
        if self.attempt >= self.settings.max_rollbacks or good is None:
            raise self._give_up()
        self.attempt += 1
        self._restore(good)
        self.guard.forgive()
        if distributed.is_main_process():
            checkpoint.remove_after(self.folder / "checkpoints", self.step)
        distributed.broadcast(None)
        self.log.start(self.step, self._log_state)
        self.batches.start(self.step, self.attempt)
        console.print(
            f"{self.task.name}: the gradient was not finite {self.settings.max_skipped} times in a row, up to step "
            f"{failed}; back to step {self.step}, with other batches (rollback {self.attempt} of at most "
            f"{self.settings.max_rollbacks})",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )

    def _give_up(self) -> SFDError:
        """Write the report of the last step, taken again: a step that failed changed no weight."""
        drawn, path = drawn_step(self.step - 1, self.attempt), self.folder / REPORT
        self.batches.start(self.step - 1, self.attempt)
        losses: dict[str, Tensor] = {}
        for part in range(self.settings.accumulate):
            for name, value in self._backward(self.batches.next(), part == self.settings.accumulate - 1).items():
                share = value.detach() / (parts(self.settings) if value.ndim == 0 else 1)
                losses[name] = losses[name] + share if name in losses else share
        if distributed.world_size() > 1:
            for value in losses.values():
                torch.distributed.all_reduce(value)
        report = {"step": self.step, "rollbacks": self.attempt, **self.guard.state()}
        report |= examination(self.network, losses)
        if distributed.is_main_process():
            indices = self.task.batch(drawn, range(self.settings.batch_size)).get("indices")
            files.write_json(path, {**report, "images": None if indices is None else indices.tolist()})
        alternative = " or precision: float32" if self.settings.precision != "float32" else ""
        return SFDError(
            f"{self.task.name}: the gradient was not finite {report['most']} steps in a row, up to step {self.step}, "
            f"and {self.attempt} rollbacks did not help; {path} says what the last step was like; start anew in "
            f"another folder, with a lower learning_rate{alternative}"
        )

    def preview(self, task: Previewing) -> None:
        """Write pictures of what has been learnt so far."""
        shown = self.result()
        if distributed.is_main_process():
            task.preview(self.step, shown, self.folder / "previews")
        self.network.train()

    def result(self) -> nn.Module:
        """Give the network, with the averaged weights where there are any; whole, where it is shared out."""
        return self.parallel.gathered(self.average if self.average is not None else self.network)

    def finish(self) -> None:
        """Wait until everything is on the disk, in all processes."""
        self.writer.wait()
        self.batches.close()
        distributed.broadcast(None)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close everything at the end, whatever that is; a failure to do so never hides why the block failed."""
        try:
            yield
        except BaseException as error:
            self.batches.close()
            if isinstance(error, Exception):
                self.writer.settle()
            with suppress(SFDError):
                self.log.close()
            raise
        self.log.close()

    def state(self) -> dict[str, Tensor]:
        """Name every live tensor that a checkpoint holds."""
        state = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        if self.average is not None:
            state |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, values in enumerate(self.optimizer.state.values()):
            state |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
        return state

    def save(self) -> None:
        """Begin to write a checkpoint, unless there is one of this step."""
        if self._saved == self.step:
            return
        guard = self.guard.state()
        record = {
            "task": self.task.name,
            "settings": self.settings.model_dump(mode="json"),
            "attempt": self.attempt,
            "guard": guard,
            "good": guard["in_a_row"] == 0 and self.settings.regular(self.step),
            "log": self.log.state(),
        }
        self.log.settle()
        if distributed.is_main_process() or self.parallel.sharded:
            self.pause = self.writer.save(self.step, self.state(), record)
        self._saved = self.step

    def _resume(self) -> None:
        if distributed.is_main_process():
            files.remove_partials(self.folder / "checkpoints")
        saved = checkpoint.newest(self.folder / "checkpoints")
        if saved is None:
            return
        _check_same_run(self.folder, self.settings, saved.record)
        self.attempt = int(saved.record["attempt"])
        self._restore(saved)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        saved.fill(self.state())
        self.guard.restore(saved.record["guard"])
        self.step = self._saved = saved.step
        self._log_state = saved.record["log"]


def _optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make AdamW with its whole state in place, as its first step would, so that a checkpoint can fill it."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def check_resume(folder: Path, settings: TrainSettings, device: torch.device) -> None:
    """Refuse settings that `fit` would refuse in this folder, without reading any tensor."""
    check(settings, device)
    record = checkpoint.newest_record(folder / "checkpoints")
    if record is not None:
        _check_same_run(folder, settings, record)


def _check_same_run(folder: Path, settings: TrainSettings, record: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would have given another result from the first step on.

    The number of steps enters the learning rate only through the cosine, so it is free until that has begun.
    """
    now = settings.fixed()
    different = first_difference({name: record["settings"].get(name) for name in now}, files.jsonable(now))
    if different is not None:
        field, before, value = different
        raise SFDError(
            f"{folder} holds a run with {field} = {before!r}, but {value!r} was given; use another folder, or the "
            "settings that the run was started with"
        )
    step, steps = record["step"], record["settings"]["steps"]
    if step > settings.steps:
        raise SFDError(
            f"{folder} holds a run of {step} steps, but {settings.steps} were asked for; ask for {step} or more, or "
            "use another folder to train for fewer"
        )
    if settings.decay == "cosine" and step > settings.decay_from and steps != settings.steps:
        raise SFDError(
            f"{folder} holds a run of {steps} steps whose learning rate has been falling since step "
            f"{settings.decay_from}, and is at step {step}; with steps = {settings.steps} it would have fallen "
            f"differently, so it can only be trained to step {steps}. To train on, start from its weights in another "
            "folder (train.init), or train anew there"
        )
