"""The training loop: every part of the method that learns is a `TrainingTask` for `fit`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sfd.models.inference import require_compiler
from sfd.training import checkpoint
from sfd.training.config import TrainSettings, ema_decay, learning_rate
from sfd.training.data import Prefetcher, micro_batches, num_workers
from sfd.training.log import TrainingLog
from sfd.utils import distributed, files
from sfd.utils.config import first_difference, with_defaults
from sfd.utils.device import choose_device, full_float32, slow_bf16, to_device
from sfd.utils.errors import Interrupted, SFDError
from sfd.utils.progress import bar, say
from sfd.utils.signals import stop_requests

# Device types whose fused AdamW ignores `found_inf` (https://github.com/pytorch/pytorch/pull/186360).
IGNORES_FOUND_INF = {"mps"}
CHECK_EVERY = 10  # steps between looks at the count of skipped steps, each of which waits for the device


class TrainingTask(Protocol):
    """What is trained. `batch` and `loss` are pure, so that a run can stop anywhere and resume exactly.

    A task may also have `preview(step, model, folder)`, which writes images that show what the model has learnt.
    """

    name: str

    @property
    def model(self) -> nn.Module:
        """The network whose parameters are optimised."""
        ...

    def batch(self, step: int, samples: range) -> dict[str, Tensor]:
        """Give some samples of a step's global batch, as CPU tensors; called ahead of time, by several threads."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute scalars: "loss" is minimised; the others are logged, and may be pairs (sum, count)."""
        ...


def fit(
    task: TrainingTask, settings: TrainSettings, folder: str | Path, *, device: str | torch.device = "auto"
) -> nn.Module:
    """Train a task, or resume where an earlier call with the same folder stopped.

    On a CPU with the same number of threads and ranks, an interrupted and an uninterrupted run end with the same bytes.
    With several ranks (`sfd.utils.distributed.init`), all call this; each takes its part of every batch. A signal to
    stop, on any rank, ends all after the same step, with a checkpoint: `Interrupted` is raised.

    Args:
        task: what to train.
        settings: how.
        folder: gets `checkpoints`, `log.jsonl` and `previews`.
        device: this rank's device.

    Returns:
        The trained model in evaluation mode, with the EMA weights if `settings.ema` is set.
    """
    device = choose_device(device)
    check_settings(settings, device)
    if settings.precision == "bf16" and (slowness := slow_bf16(device)):
        say(f"{task.name}: {slowness}")
    with full_float32(), _out_of_memory_advice(task, settings, device):
        trainer = Trainer(task, settings, Path(folder), device)
        trainer.resume()
        with trainer.running(), bar(task.name, settings.steps, trainer.step) as progress, stop_requests() as received:
            stop = 0
            while trainer.step < settings.steps and not stop:
                trainer.train_step()
                progress.set_postfix_str(trainer.log_step(), refresh=False)
                progress.update(trainer.step - progress.n)
                trainer.preview()
                # A signal that comes from here on is seen after the next step, or at the end.
                stop = distributed.all_reduce_max(received[0] if received else 0)
                trainer.save_if_due(stopping=bool(stop))
            trainer.writer.wait()
            distributed.barrier()
        stop = distributed.all_reduce_max(received[0] if received else 0)
    if stop:
        raise Interrupted(stop)
    return trainer.result()


class Trainer:
    """The state of a run: weights, EMA, optimizer, and number of steps taken."""

    def __init__(self, task: TrainingTask, settings: TrainSettings, folder: Path, device: torch.device) -> None:
        self.task, self.settings, self.folder, self.device = task, settings, folder, device
        self.network = task.model.to(device).train()
        self.model = _distributed(self.network, settings, device)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False) if settings.ema is not None else None
        self.optimizer = _optimizer(self.network, settings)
        threads = num_workers(settings, device)
        self.data = Prefetcher(task.batch, settings, threads=threads, pinned=device.type == "cuda")
        self.log = TrainingLog(folder, settings.batch_size)
        self.writer = checkpoint.CheckpointWriter(folder / "checkpoints", settings)
        self.step = 0
        self._saved: int | None = None  # step of the newest checkpoint of this state
        self._checkpoint_pause = 0.0
        # Steps without a finite gradient, at present in a row and in all; on the device.
        self._streak, self._skipped = (torch.zeros((), device=device) for _ in range(2))

    def train_step(self) -> None:
        """Take one step: AdamW on the mean loss over the global batch, which all ranks and micro-batches share.

        A step whose gradient is not finite is skipped, without synchronising with the device.
        """
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        for micro in range(settings.accumulate):
            batch = {name: to_device(value, self.device) for name, value in self.data.next().items()}
            with self._gradient_sync(last=micro == settings.accumulate - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    losses = self.task.loss(self.model, batch)
                loss = losses["loss"]
                # The gradient of loss / accumulate; all of it is NaN where the loss is not finite.
                loss.backward(torch.where(torch.isfinite(loss), 1 / settings.accumulate, math.nan).to(loss.dtype))
            self.log.collect(losses, 1 / micro_batches(settings))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip or math.inf)
        self.log.collect({"gradient_norm": norm}, 1 / distributed.world_size())

        skip = (~torch.isfinite(norm)).float()
        self._streak, self._skipped = (self._streak + 1) * skip, self._skipped + skip
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # 1: the optimizer's kernel changes nothing
        if self.device.type not in IGNORES_FOUND_INF or not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            update = get_ema_multi_avg_fn(ema_decay(settings, self.step))
            update(list(self.ema.parameters()), list(self.network.parameters()), None)
        self.step += 1

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks exchange gradients in the last micro-batch of a step only."""
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], self.model.no_sync())

    def log_step(self) -> str:
        """Write a line to the log where one is due, and refuse to continue after too many skipped steps."""
        self.writer.check()
        self.log.count_step()
        last = self.step == self.settings.steps
        if self.step % CHECK_EVERY == 0 or last:
            self._check_skipped()
        if self.step % self.settings.log_every and not last:
            return self.log.note
        extra = {"learning_rate": self.optimizer.param_groups[0]["lr"], "skipped": int(self._skipped)}
        extra["waiting"] = self.data.waiting()
        if self._checkpoint_pause:
            extra["checkpoint_pause"], self._checkpoint_pause = self._checkpoint_pause, 0.0
        return self.log.write(self.step, extra)

    def _check_skipped(self) -> None:
        settings, streak = self.settings, int(self._streak)
        if streak >= min(settings.max_skipped, settings.steps):
            raise SFDError(
                f"{self.task.name}: the gradient was not finite {streak} steps in a row, up to step {self.step}; "
                f"resume from the last checkpoint with train.data_offset={settings.data_offset + 1_000_000} (other "
                "batches), or start anew with a lower learning_rate or precision: float32",
                said_by_rank_0=not distributed.is_main_process(),
            )

    def preview(self) -> None:
        """Let the task show what the model has learnt, where that is due."""
        every, show = self.settings.preview_every, getattr(self.task, "preview", None)
        if show is not None and every and self.step % every == 0 and distributed.is_main_process():
            show(self.step, self.result(), self.folder / "previews")
            self.network.train()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepare batches and write checkpoints within the block."""
        self.data.start(self.step)
        try:
            yield
        finally:
            self.data.close()
            self.writer.close()

    def result(self) -> nn.Module:
        """Give the averaged network, or the network itself without an average, in evaluation mode."""
        return (self.ema if self.ema is not None else self.network).eval()

    def state(self) -> dict[str, Tensor]:
        """Name every live tensor that a checkpoint holds."""
        state = {f"model.{name}": t for name, t in self.network.state_dict().items()}
        if self.ema is not None:
            state |= {f"ema.{name}": t for name, t in self.ema.state_dict().items()}
        for index, values in enumerate(self.optimizer.state.values()):
            state |= {f"optimizer.{index}.{name}": t for name, t in values.items()}
        return state

    def save_if_due(self, *, stopping: bool) -> None:
        """Begin to write a checkpoint at its step, at the end, and before stopping.

        None is written while steps are being skipped, so that the newest is one from before that.
        """
        must = stopping or self.step == self.settings.steps
        due = must or (self.settings.checkpoint_due(self.step) and not self._streak)
        if not due or self._saved == self.step:
            return
        record = {
            "task": self.task.name,
            "settings": self.settings.model_dump(mode="json"),
            "skipped": {"streak": int(self._streak), "total": int(self._skipped)},
            "log": self.log.state(),
        }
        if distributed.is_main_process():
            self._checkpoint_pause = self.writer.save(self.step, self.state(), record)
        self._saved = self.step

    def resume(self) -> None:
        """Take up the newest checkpoint, or start anew where there is none."""
        folder = self.folder / "checkpoints"
        if distributed.is_main_process():
            files.remove_partials(folder)
        saved = checkpoint.newest(folder)
        if saved is not None:
            _check_same_run(self.folder, self.settings, saved.record)
            saved.fill(self.state())
            self.step = self._saved = saved.step
            self._streak += saved.record["skipped"]["streak"]
            self._skipped += saved.record["skipped"]["total"]
            if self.step < self.settings.steps:
                say(f"{self.task.name}: resuming after step {self.step}")
        if distributed.is_main_process() and self.step < self.settings.steps:
            self.writer.check_space(self.state())
        self.log.start(self.step, saved.record["log"] if saved is not None else [])


def _distributed(network: nn.Module, settings: TrainSettings, device: torch.device) -> nn.Module:
    """Compile the network where configured, and let its copies on all ranks exchange gradients (DDP)."""
    model: nn.Module = cast(nn.Module, torch.compile(network)) if settings.compile else network
    if not distributed.has_group():
        return model
    with warnings.catch_warnings():
        # No buffer changes in training, so none is sent; the argument that says so is about to be renamed.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )


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


def check_settings(settings: TrainSettings, device: torch.device) -> None:
    """Refuse what this number of ranks, or this machine, cannot do."""
    if distributed.world_size() > 1 and not distributed.has_group():
        raise SFDError(
            f"RANK and WORLD_SIZE describe {distributed.world_size()} ranks, but there is no process group for them to "
            "train together; start them with torchrun (in Python: sfd.utils.distributed.init), or unset WORLD_SIZE"
        )
    if settings.batch_size % micro_batches(settings):
        raise SFDError(
            f"batch_size {settings.batch_size} does not divide into {distributed.world_size()} ranks × "
            f"{settings.accumulate} micro-batches; make it a multiple of {micro_batches(settings)}"
        )
    if settings.compile:
        require_compiler(device)


@contextmanager
def _out_of_memory_advice(task: TrainingTask, settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Say what to do where a step does not fit a GPU; a launcher that restarted it would change nothing."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = settings.batch_size // micro_batches(settings)
        raise SFDError(
            f"{task.name}: the memory of {device} does not hold a step with micro-batches of {size} images "
            f"({str(error).split('. ')[0]}); make them smaller with a larger `train.accumulate` than "
            f"{settings.accumulate}, or keep fewer activations with `transformer.checkpointing` (selective or true)"
        ) from None


def check_resume(folder: Path, settings: TrainSettings, device: torch.device) -> None:
    """Refuse settings that `fit` would refuse in this folder, without reading any tensor."""
    check_settings(settings, device)
    record = checkpoint.newest_record(folder / "checkpoints")
    if record is not None:
        _check_same_run(folder, settings, record)


def _check_same_run(folder: Path, settings: TrainSettings, record: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would have given another result from the first step on.

    The number of steps enters the learning rate only through the cosine, so it is free until that has begun.
    """
    now = files.jsonable(settings.fixed())
    before = with_defaults(record["settings"], now, TrainSettings)
    different = first_difference({name: before[name] for name in now}, now)
    if different is not None:
        field, old, value = different
        raise SFDError(
            f"{folder} holds a run with {field} = {old!r}, but {value!r} was given; use another folder, or the "
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
            f"{folder} is at step {step} of {steps}, and its learning rate has been falling since step "
            f"{settings.decay_from}, towards another end than with {settings.steps} steps; train to step {steps}, or "
            "give another --out folder and start from these weights (train.init, of the transformer)"
        )
