"""The training loop on a real, tiny task."""

import errno
import json
import os
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from sfd.training import checkpoint
from sfd.training.config import TrainSettings, learning_rate
from sfd.training.log import TrainingLog
from sfd.training.trainer import fit
from sfd.utils import files, rng
from sfd.utils.config import parse
from sfd.utils.errors import Interrupted, SFDError

CPU = torch.device("cpu")
SETTINGS = TrainSettings(steps=12, batch_size=8, learning_rate=1e-2, ema=0.9, log_every=5, checkpoint_every=4)


class Regression:
    """Learns the sum of eight numbers."""

    name = "regression"

    def __init__(self, width: int = 4, stop_at: int | None = None, number: int = signal.SIGINT):
        with rng.seeded(0, "regression"):
            self.model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
        self.stop_at, self.number, self.step = stop_at, number, -1

    def batch(self, step, samples):
        rows = [rng.generator(0, "x", step, i).standard_normal(8, dtype=np.float32) for i in samples]
        return {"x": torch.from_numpy(np.stack(rows)), "step": torch.tensor(step)}

    def loss(self, model, batch):
        if batch["step"].item() == self.stop_at:
            os.kill(os.getpid(), self.number)
        return {"loss": (model(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()}


class Meddling(Regression):
    """Does something else at one step."""

    def __init__(self, at, do):
        super().__init__()
        self.at, self.do = at, do

    def loss(self, model, batch):
        if batch["step"].item() == self.at:
            self.do()
        return super().loss(model, batch)


def changed(**fields):
    return SETTINGS.model_copy(update=fields)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "checkpoint_pause", "waiting")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(Regression(), SETTINGS, folder, device=CPU)


def threads_of_tensorboard():
    return [thread for thread in threading.enumerate() if "AsyncWriter" in type(thread).__name__]


def test_the_same_training_gives_the_same_bytes(whole, tmp_path):
    assert same_weights(whole[1], fit(Regression(), SETTINGS, tmp_path, device=CPU))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_stopped_run_leaves_with_its_own_code(tmp_path, number, code):
    with pytest.raises(Interrupted) as stopped:
        fit(Regression(stop_at=6, number=number), SETTINGS, tmp_path, device=CPU)
    assert stopped.value.code == code and checkpoint.newest(tmp_path / "checkpoints").step == 7


def test_a_stop_during_the_last_step_is_heard(whole, tmp_path):
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=11), SETTINGS, tmp_path, device=CPU)
    assert same_weights(whole[1], fit(Meddling(0, pytest.fail), SETTINGS, tmp_path, device=CPU))


def test_a_stop_during_the_last_preview_is_heard(tmp_path):
    class Previewed(Regression):
        def preview(self, step, model, folder):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(Previewed(), changed(preview_every=12), tmp_path, device=CPU)
    assert checkpoint.newest(tmp_path / "checkpoints").step == 12


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_tensorboard_is_closed_however_training_ends(tmp_path, end):
    def fail():
        raise ZeroDivisionError

    if end == "finished":
        fit(Regression(), SETTINGS, tmp_path, device=CPU)
    else:
        task = Regression(stop_at=6) if end == "stopped" else Meddling(6, fail)
        with pytest.raises(Interrupted if end == "stopped" else ZeroDivisionError):
            fit(task, SETTINGS, tmp_path, device=CPU)
    assert threads_of_tensorboard() == []


def test_a_log_on_a_full_disk_is_explained(tmp_path):
    def fill():
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to("/dev/full")  # every write to it fails with ENOSPC

    with pytest.raises(SFDError, match=f"no space left on the disk that holds {tmp_path};"):
        fit(Meddling(8, fill), SETTINGS, tmp_path, device=CPU)
    assert threads_of_tensorboard() == []


def test_the_speed_of_a_resumed_run_is_its_own(tmp_path):
    log = TrainingLog(tmp_path, 8)
    log.start(1000, {"loss": [[3000.0, 1000.0]]})
    time.sleep(0.05)
    log.collect({"loss": torch.tensor(3.0)})
    log.step()
    log.write(1001, {})
    log.close()
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["loss"] == pytest.approx(3)
    assert line["images_per_second"] <= 8 / 0.05


@pytest.mark.parametrize("stop_at", [0, 3, 6, 10])
def test_a_resumed_run_ends_with_the_same_bytes(whole, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=stop_at), SETTINGS, tmp_path, device=CPU)
    assert same_weights(whole[1], fit(Regression(), SETTINGS, tmp_path, device=CPU))


def test_the_log_says_what_share_of_the_time_training_waited_for_batches(whole, tmp_path):
    class Slow(Regression):
        def batch(self, step, samples):
            time.sleep(0.05)
            return super().batch(step, samples)

    def waiting(folder):
        return [json.loads(line)["waiting"] for line in (folder / "log.jsonl").read_text().splitlines()]

    fit(Slow(), changed(log_every=4, checkpoint_every=12), tmp_path, device=CPU)
    assert min(waiting(tmp_path)[1:]) > 0.5
    assert all(0 <= share <= 1 for share in waiting(whole[0]))


def test_training_in_bf16_without_instructions_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    fit(Regression(), changed(steps=1, precision="bf16"), tmp_path, device=CPU)
    assert "no bf16 instructions" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_network_learns_as_the_plain_one_does(whole, tmp_path):
    compiled = fit(Regression(), changed(compile=True), tmp_path, device=CPU)
    for ours, theirs in zip(compiled.parameters(), whole[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert compiled.state_dict().keys() == whole[1].state_dict().keys()


def test_compiling_shared_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sfd.utils.distributed.world_size", lambda: 2)
    monkeypatch.setattr("sfd.utils.distributed.company", object)
    with pytest.raises(SFDError, match="parallel: ddp or compile: false"):
        fit(Regression(), changed(parallel="fsdp", compile=True), tmp_path, device=CPU)


def test_a_resumed_run_has_the_same_log(whole, tmp_path):
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=6), SETTINGS, tmp_path, device=CPU)
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    assert log(tmp_path) == log(whole[0])


def test_a_damaged_log_is_named(tmp_path):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    path = tmp_path / "log.jsonl"
    path.write_text("stop".join(path.read_text().rsplit("step", 1)))
    with pytest.raises(SFDError, match=r"log\.jsonl is damaged \('step'\)"):
        fit(Regression(), changed(steps=14), tmp_path, device=CPU)


def test_a_finished_run_is_not_trained_again(whole):
    before = (whole[0] / "log.jsonl").read_text()
    fit(Regression(stop_at=0), SETTINGS, whole[0], device=CPU)
    assert (whole[0] / "log.jsonl").read_text() == before


def damage(folder, step):
    state = folder / "checkpoints" / f"step-{step:09d}" / checkpoint.STATE
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    damage(tmp_path, 12)
    assert checkpoint.newest(tmp_path / "checkpoints").step == 8
    assert same_weights(whole[1], fit(Regression(), SETTINGS, tmp_path, device=CPU))


def saved_steps(folder):
    return sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))


def test_old_checkpoints_are_thinned(whole, tmp_path):
    fit(Regression(), changed(steps=14, checkpoint_every=2, keep_checkpoints=3, keep_every=6), tmp_path, device=CPU)
    assert (saved_steps(whole[0]), saved_steps(tmp_path)) == ([8, 12], [6, 10, 12, 14])


def test_a_stop_s_checkpoint_takes_no_other_s_place(tmp_path):
    for step in (5, 9, 10):
        with pytest.raises(Interrupted):
            fit(Regression(stop_at=step), SETTINGS, tmp_path, device=CPU)
    assert saved_steps(tmp_path) == [4, 8, 11]


def test_a_damaged_checkpoint_takes_no_other_s_place(tmp_path):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    damage(tmp_path, 12)
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=9), changed(keep_checkpoints=1), tmp_path, device=CPU)
    assert checkpoint.newest(tmp_path / "checkpoints").step == 10


def test_a_copy_of_a_checkpoint_is_let_be(tmp_path):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    kept = tmp_path / "checkpoints" / "step-000000012-kept"
    (tmp_path / "checkpoints" / "step-000000012").rename(kept)
    fit(Regression(), changed(keep_every=4), tmp_path, device=CPU)
    assert kept.is_dir()


def test_training_goes_on_while_a_checkpoint_is_written(whole, tmp_path, monkeypatch):
    written, begun = threading.Event(), threading.Event()
    write_tensors = files.write_tensors

    def slow(path, tensors):
        begun.set()
        assert written.wait(60)
        write_tensors(path, tensors)

    def overtake():
        assert begun.wait(60)
        written.set()

    monkeypatch.setattr(files, "write_tensors", slow)
    # The first checkpoint is still being written when the third step is taken; what it holds is the first state.
    trained = fit(Meddling(3, overtake), SETTINGS, tmp_path, device=CPU)
    assert same_weights(whole[1], trained)
    first = files.read_tensors(whole[0] / "checkpoints" / "step-000000008" / checkpoint.STATE)
    again = files.read_tensors(tmp_path / "checkpoints" / "step-000000008" / checkpoint.STATE)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_checkpoint_on_a_full_disk_is_explained(tmp_path, monkeypatch):
    write_tensors = files.write_tensors

    def full(path, tensors):
        if "000000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(path, tensors)

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(SFDError, match="no space left on the disk"):
        fit(Regression(), SETTINGS, tmp_path, device=CPU)
    assert saved_steps(tmp_path) == [0, 4] and not list((tmp_path / "checkpoints").glob(".*"))


@pytest.fixture
def shares(tmp_path):
    """A writer of shared-out state, of which this one process has all."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield checkpoint.Writer(tmp_path, SETTINGS, sharded=True)
    torch.distributed.destroy_process_group()


def test_shares_that_cannot_be_written_are_explained(shares, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        shares.save(4, {"weight": torch.zeros(1000)}, {"good": True})
        with pytest.raises(SFDError, match="File too large"):
            shares.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1.0, float("inf")])
def test_shares_are_good_where_all_numbers_are_finite(shares, tmp_path, number):
    shares.save(4, {"weight": torch.full((10,), number)}, {"good": True})
    shares.wait()
    record = files.read_json(tmp_path / "step-000000004" / checkpoint.RECORD, "checkpoint")
    assert record["good"] is (number == 1.0)


def test_accumulation_gives_the_same_training(whole, tmp_path):
    split = fit(Regression(), changed(accumulate=4), tmp_path, device=CPU)
    for a, b in zip(whole[1].parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_average_lags_behind_the_weights(tmp_path):
    with_average = fit(Regression(), SETTINGS, tmp_path / "a", device=CPU)
    without = fit(Regression(), changed(ema=None), tmp_path / "b", device=CPU)
    assert not same_weights(with_average, without)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    with pytest.raises(SFDError, match="of another configuration"):
        fit(Regression(width=5), changed(steps=20), tmp_path, device=CPU)


def test_a_run_with_other_settings_is_refused(tmp_path):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    with pytest.raises(SFDError, match=r"learning_rate = 0\.01, but 0\.02"):
        fit(Regression(), changed(steps=20, learning_rate=0.02), tmp_path, device=CPU)


def test_a_run_can_be_made_longer(tmp_path):
    fit(Regression(), SETTINGS, tmp_path / "a", device=CPU)
    longer = fit(Regression(), changed(steps=20), tmp_path / "a", device=CPU)
    assert same_weights(longer, fit(Regression(), changed(steps=20), tmp_path / "b", device=CPU))


def test_a_run_cannot_be_made_shorter(whole):
    with pytest.raises(SFDError, match=r"holds a run of 12 steps, but 10 were asked for"):
        fit(Regression(), changed(steps=10), whole[0], device=CPU)


def test_a_checkpoint_that_was_never_finished_is_removed(tmp_path):
    half = tmp_path / "checkpoints" / ".step-000000003.partial"
    half.mkdir(parents=True)
    (half / checkpoint.STATE).write_text("half")
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    assert not half.exists()


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(SFDError, match="multiple of 3"):
        fit(Regression(), changed(accumulate=3), tmp_path, device=CPU)


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    worker = threading.Thread(target=fit, args=(Regression(), SETTINGS, tmp_path), kwargs={"device": CPU})
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGINT) is before and (tmp_path / "checkpoints" / "step-000000012").is_dir()


def test_warm_up_rises_linearly():
    settings = changed(warmup=4)
    assert [learning_rate(settings, s) for s in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_cosine_ends_at_a_tenth():
    settings = changed(decay="cosine", steps=100)
    assert learning_rate(settings, 0) == pytest.approx(0.01)
    assert learning_rate(settings, 100) == pytest.approx(0.001)


def test_unknown_settings_name_the_nearest():
    with pytest.raises(SFDError, match="did you mean 'learning_rate'"):
        parse(TrainSettings, {"steps": 1, "batch_size": 1, "learning_rat": 0.1})
