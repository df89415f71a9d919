"""The training loop on a real, tiny task: results, resuming, checkpoints, log, and steps that are skipped."""

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from helpers.training import (
    SETTINGS,
    Meddling,
    Poisoned,
    Regression,
    changed,
    read_log,
    same_weights,
    saved_steps,
    timeless_log,
)
from sfd.training import checkpoint, trainer
from sfd.training.checkpoint import CheckpointWriter
from sfd.training.config import learning_rate
from sfd.training.log import TrainingLog
from sfd.training.trainer import fit
from sfd.utils import files
from sfd.utils.errors import Interrupted, SFDError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run: its folder and its result."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, fit(Regression(), SETTINGS, folder, device=CPU)


def test_the_same_training_gives_the_same_bytes_and_changes_no_global_setting(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    task = Meddling(0, lambda: seen.append(torch.backends.cudnn.allow_tf32))
    assert same_weights(uninterrupted[1], fit(task, SETTINGS, str(tmp_path), device="cpu"))
    assert seen == [False] and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_saves_a_checkpoint_and_sets_the_exit_code(tmp_path, number, code):
    with pytest.raises(Interrupted) as stopped:
        fit(Regression(stop_at=6, number=number), SETTINGS, tmp_path, device=CPU)
    assert stopped.value.code == code and checkpoint.newest(tmp_path / "checkpoints").step == 7


@pytest.mark.parametrize("stop_at", [0, 3, 6, 10, 11])
def test_a_resumed_run_ends_with_the_same_bytes_and_log(uninterrupted, tmp_path, stop_at):
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=stop_at), SETTINGS, tmp_path, device=CPU)
    assert same_weights(uninterrupted[1], fit(Regression(), SETTINGS, tmp_path, device=CPU))
    assert timeless_log(tmp_path) == timeless_log(uninterrupted[0])


def test_a_signal_during_the_last_preview_stops_training(tmp_path):
    class Previewed(Regression):
        def preview(self, step, model, folder):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(Previewed(), changed(preview_every=12), tmp_path, device=CPU)
    assert checkpoint.newest(tmp_path / "checkpoints").step == 12


def test_a_finished_training_is_not_repeated(uninterrupted):
    before = (uninterrupted[0] / "log.jsonl").read_text()
    fit(Meddling(0, pytest.fail), SETTINGS, uninterrupted[0], device=CPU)
    assert (uninterrupted[0] / "log.jsonl").read_text() == before


def test_a_finished_training_can_be_extended(tmp_path):
    fit(Regression(), SETTINGS, tmp_path / "a", device=CPU)
    longer = fit(Regression(), changed(steps=20), tmp_path / "a", device=CPU)
    assert same_weights(longer, fit(Regression(), changed(steps=20), tmp_path / "b", device=CPU))


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (Regression(), {"learning_rate": 0.02}, r"learning_rate = 0\.01, but 0\.02"),
        (Regression(), {"steps": 10}, "holds a run of 12 steps"),
        (Regression(width=5), {"steps": 20}, r"another network \(ema\.0\.bias has shape \(4,\), expected \(5"),
        (Regression(), {"accumulate": 3}, "multiple of 3"),
    ],
)
def test_incompatible_settings_cannot_resume(uninterrupted, task, fields, message):
    with pytest.raises(SFDError, match=message):
        fit(task, changed(**fields), uninterrupted[0], device=CPU)


def test_ranks_without_a_process_group_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # by itself, as left over in an environment, it means nothing
    fit(Regression(), changed(steps=1), tmp_path, device=CPU)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SFDError, match="no process group"):
        fit(Regression(), SETTINGS, tmp_path, device=CPU)


def test_micro_batches_give_the_same_training(uninterrupted, tmp_path):
    divided = fit(Regression(), changed(accumulate=4), tmp_path, device=CPU)
    for a, b in zip(uninterrupted[1].parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_ema_is_the_average_of_the_weights_after_each_step(tmp_path):
    ema = fit(Regression(), changed(steps=3), tmp_path / "ema", device=CPU)
    expected = list(Regression().model.parameters())
    for steps in (1, 2, 3):
        after = fit(Regression(), changed(steps=steps, ema=None), tmp_path / str(steps), device=CPU).parameters()
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, after, strict=True)]
    for e, p in zip(expected, ema.parameters(), strict=True):
        torch.testing.assert_close(p, e.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_network_is_trained_like_the_plain_one(uninterrupted, tmp_path):
    compiled = fit(Regression(), changed(compile=True), tmp_path, device=CPU)
    for ours, theirs in zip(compiled.parameters(), uninterrupted[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert compiled.state_dict().keys() == uninterrupted[1].state_dict().keys()


def test_an_out_of_memory_error_suggests_accumulation(tmp_path):
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    with pytest.raises(SFDError, match=r"micro-batches of 4 images .*larger `train.accumulate` than 2"):
        fit(Meddling(1, fill), changed(accumulate=2), tmp_path, device=CPU)


def test_warm_up_rises_linearly_and_the_cosine_ends_at_a_tenth():
    settings = changed(warmup=4)
    assert [learning_rate(settings, s) for s in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    settings = changed(decay="cosine", steps=100)
    assert [learning_rate(settings, s) for s in (0, 100)] == pytest.approx([0.01, 0.001])


# Checkpoints


def damage(folder, step):
    path = folder / "checkpoints" / f"step-{step:09d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_skipped_and_does_not_count_as_kept(tmp_path, uninterrupted):
    fit(Regression(), SETTINGS, tmp_path, device=CPU)
    damage(tmp_path, 12)
    with pytest.raises(Interrupted):
        fit(Regression(stop_at=9), changed(keep_checkpoints=1), tmp_path, device=CPU)
    assert saved_steps(tmp_path) == [10]
    assert same_weights(uninterrupted[1], fit(Regression(), SETTINGS, tmp_path, device=CPU))
    damage(tmp_path, 10)
    damage(tmp_path, 12)
    with pytest.raises(SFDError, match="no intact checkpoint"):
        fit(Regression(), SETTINGS, tmp_path, device=CPU)


def test_the_newest_checkpoints_and_regular_ones_are_kept(uninterrupted, tmp_path):
    fit(Regression(), changed(steps=14, checkpoint_every=2, keep_checkpoints=3, keep_every=6), tmp_path, device=CPU)
    assert (saved_steps(uninterrupted[0]), saved_steps(tmp_path)) == ([8, 12], [6, 10, 12, 14])


def test_training_continues_while_a_checkpoint_is_written(uninterrupted, tmp_path, monkeypatch):
    written, begun = threading.Event(), threading.Event()
    write_tensors = files.write_tensors

    def slow(path, tensors, metadata):
        begun.set()
        assert written.wait(60)
        write_tensors(path, tensors, metadata)

    def overtake():
        assert begun.wait(60)
        written.set()

    monkeypatch.setattr(files, "write_tensors", slow)
    # The checkpoint of step 4 is still being written when step 6 is taken; it holds the state after step 4.
    assert same_weights(uninterrupted[1], fit(Meddling(6, overtake), SETTINGS, tmp_path, device=CPU))
    folders = uninterrupted[0], tmp_path
    first, again = (files.read_tensors(f / "checkpoints" / "step-000000008.safetensors") for f in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_full_disk_ends_training_with_one_sentence(tmp_path, monkeypatch):
    write_tensors = files.write_tensors

    def full(path, tensors, metadata):
        if "000000008" in str(path):
            raise files.as_user_error(OSError(errno.ENOSPC, "No space left on device"), path)
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(SFDError, match="no space left on the disk"):
        fit(Regression(), SETTINGS, tmp_path, device=CPU)
    assert saved_steps(tmp_path) == [4]


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SFDError, match="GiB more"):
        fit(Meddling(0, pytest.fail), SETTINGS, tmp_path, device=CPU)


def test_pinned_copies_are_synchronised_even_if_the_last_tensor_is_on_the_cpu(tmp_path, monkeypatch):
    device, waited = torch.device("cuda", 0), []
    on_gpu = SimpleNamespace(device=device, detach=lambda: torch.zeros(()))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.zeros(()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device))
    CheckpointWriter(tmp_path, SETTINGS)._copy({"on a GPU": on_gpu, "on the CPU": torch.zeros(())})
    assert waited == [device]


# The log


def test_unfinished_averages_of_the_log_survive_resuming(tmp_path):
    before = TrainingLog(tmp_path, 8)
    before.start(999, [])
    before.collect({"velocity/my stream": torch.tensor(2.0)})
    log = TrainingLog(tmp_path, 8)
    log.start(1000, before.state())
    time.sleep(0.05)
    log.collect({"velocity/my stream": torch.tensor(4.0)})
    log.count_step()
    log.write(1001, {})
    line = read_log(tmp_path)[0]
    assert line["velocity/my stream"] == pytest.approx(3) and line["images_per_second"] <= 8 / 0.05


# Gradients that are not finite


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_weight(tmp_path, kind):
    clean = fit(Poisoned(()), changed(steps=5, ema=None), tmp_path / "clean", device=CPU)
    poisoned = fit(Poisoned({5}, kind), changed(steps=6, ema=None), tmp_path / "poisoned", device=CPU)
    assert same_weights(clean, poisoned)
    assert read_log(tmp_path / "poisoned")[-1]["skipped"] == 1


def test_a_non_finite_step_changes_no_weight_where_the_optimizer_ignores_found_inf(tmp_path, monkeypatch):
    expected = fit(Poisoned({5}), changed(steps=8), tmp_path / "a", device=CPU)
    monkeypatch.setattr(trainer, "IGNORES_FOUND_INF", {"cpu"})
    assert same_weights(expected, fit(Poisoned({5}), changed(steps=8), tmp_path / "b", device=CPU))


def test_the_loss_of_a_skipped_step_is_not_logged(tmp_path):
    fit(Poisoned({7}), changed(log_every=1), tmp_path, device=CPU)
    lines = read_log(tmp_path)
    assert "loss" in lines[6] and "loss" not in lines[7] and "loss" in lines[8]


@pytest.mark.parametrize("stop_at", [6, 9])
def test_a_run_with_skipped_steps_resumes_exactly(tmp_path, stop_at):
    bad = {5, 6, 9}
    whole = fit(Poisoned(bad), SETTINGS, tmp_path / "whole", device=CPU)
    with pytest.raises(Interrupted):
        fit(Poisoned(bad, stop_at=stop_at), SETTINGS, tmp_path / "parts", device=CPU)
    assert same_weights(whole, fit(Poisoned(bad), SETTINGS, tmp_path / "parts", device=CPU))
    assert timeless_log(tmp_path / "parts") == timeless_log(tmp_path / "whole")


def test_too_many_skipped_steps_stop_training_until_data_offset_changes(tmp_path):
    settings, bad = changed(steps=40, max_skipped=4), range(15, 25)
    for _ in range(2):  # the same command fails in the same way
        with pytest.raises(SFDError, match=r"5 steps in a row, up to step 20; .*train\.data_offset=1000000"):
            fit(Poisoned(bad), settings, tmp_path, device=CPU)
        assert saved_steps(tmp_path) == [8, 12], "none of the steps that fail"
    fit(Poisoned(bad), settings.model_copy(update={"data_offset": 1_000_000}), tmp_path, device=CPU)
    assert [line["step"] for line in read_log(tmp_path)] == list(range(5, 41, 5))
    assert read_log(tmp_path)[-1]["skipped"] == 0
