"""Several processes train what one does; they stop, fail and resume together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import worker
from sfd.data.shapes import ShapesSource
from sfd.generation.config import SamplingConfig
from sfd.generation.model import load_model
from sfd.utils import files
from test_diffusion import make_latents
from tiny import write_recipe

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "training-at-scale.md"
STEPS = {"steps": 50, "batch_size": 8, "learning_rate": 1e-3, "ema": 0.9, "log_every": 10, "checkpoint_every": 20}
FEW = STEPS | {"steps": 16, "log_every": 4}
SHARED = FEW | {"parallel": "fsdp"}
LATE = FEW | {"log_every": 16}  # a line that gathers all steps


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    paths = os.pathsep.join([str(TESTS), *sys.path])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*launcher, *map(str, arguments)], env=environment(), capture_output=True, text=True)


def pair(*arguments):
    """Start the command as two processes by the environment alone, as a queue's own launcher does."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "sfd", *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **meeting),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def distance(a, b):
    """The largest relative difference of a tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-9)) for name in b)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs of one process and of two, and some that change between them."""
    folder = tmp_path_factory.mktemp("jobs")
    make_latents(ShapesSource(24, 0, 16), folder / "latents")
    results = {name: worker.train(folder, name, s).state_dict() for name, s in (("one", STEPS), ("few", FEW))}
    results["accumulated"] = worker.train(folder, "accumulated", STEPS | {"accumulate": 2}).state_dict()
    assert worker.train(folder, "changing", FEW, (3, 0)) is None
    together = [
        ("two", STEPS, None),
        ("shared", SHARED, None),
        ("changing", SHARED, (6, 1)),
        ("changing", FEW | {"accumulate": 2}, (9, 0)),
        ("changing", SHARED, (12, 1)),
        ("uninterrupted", LATE, None),
        ("interrupted", LATE, (5, 1)),
        ("interrupted", LATE, None),
    ]
    (folder / "jobs.json").write_text(json.dumps(together))
    ended = torchrun(TESTS / "worker.py", folder)
    assert ended.returncode == 0, ended.stderr
    results["changing"] = worker.train(folder, "changing", FEW).state_dict()
    for name in ("two", "shared", "uninterrupted", "interrupted"):
        first, second = (files.read_tensors(folder / f"{name}-{rank}.safetensors") for rank in range(2))
        assert distance(first, second) == 0
        results[name] = first
    return folder, results


@pytest.mark.parametrize(
    ("name", "reference"), [("accumulated", "one"), ("two", "one"), ("shared", "few"), ("changing", "few")]
)
def test_however_a_batch_is_divided_the_training_is_the_same(jobs, name, reference):
    assert distance(jobs[1][name], jobs[1][reference]) < 1e-5


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "reference"), [("two", "one"), ("shared", "few"), ("changing", "few")])
def test_however_a_batch_is_divided_the_log_is_the_same(jobs, name, reference):
    for a, b in zip(lines(jobs[0] / name), lines(jobs[0] / reference), strict=True):
        timing = {"images_per_second", "checkpoint_pause", "waiting"}
        assert a.keys() - timing == b.keys() - timing
        for key in a.keys() - timing:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)


def test_an_interruption_changes_no_bit_of_weights_and_log(jobs):
    folder, results = jobs
    assert distance(results["interrupted"], results["uninterrupted"]) == 0
    timing = {"images_per_second": 0, "checkpoint_pause": 0, "waiting": 0}
    a, b = ([line | timing for line in lines(folder / name)] for name in ("interrupted", "uninterrupted"))
    assert a == b


def test_shares_are_saved_by_the_processes_that_hold_them(jobs):
    newest = jobs[0] / "shared" / "checkpoints" / "step-000000016"
    assert len(list(newest.glob("shard-*.safetensors"))) == 2


def copied(finished, folder):
    shutil.copytree(finished.folder.root, folder, ignore=shutil.ignore_patterns("training", "model", "samples"))
    return folder


def wait_for(condition, processes):
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    assert condition(), [process.communicate() for process in processes]


SCRIPTS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_documented_scripts_are_valid(number):
    subprocess.run(["bash", "-n"], input=SCRIPTS[number], text=True, check=True)


MEETING = """
import time
from datetime import timedelta
from sfd.utils import distributed
distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=1)
distributed.init("cpu")
time.sleep(3 * distributed.rank())
distributed.barrier()
distributed.shutdown()
"""


def test_processes_wait_for_one_another_longer_than_a_collective_may_take(tmp_path):
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    ended = torchrun(script)
    assert ended.returncode == 0, ended.stderr


def test_a_killed_worker_is_started_again_and_the_run_is_the_same(finished, tmp_path):
    out = copied(finished, tmp_path / "out")
    checkpoints = out / "training" / "checkpoints"
    script = tmp_path / "train.sbatch"
    script.write_text(SCRIPTS[0])
    job = environment(RECIPE=str(write_recipe(tmp_path)), RUN=str(out), GPUS="2", HOURS="0.5")
    job["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), job["PATH"]])
    command = ["bash", script, "--device", "cpu", "train.parallel=fsdp"]
    process = subprocess.Popen(command, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list(checkpoints.glob("step-00000000[24]")), [process])
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    workers[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    weights = [files.read_tensors(run / "model" / "model.safetensors") for run in (out, finished.folder.root)]
    assert distance(*weights) < 1e-4
    sampled = next(load_model(out / "model", worker.CPU).sample_batches([0], [0], SamplingConfig(steps=3)))
    assert sampled.images.shape == (1, 32, 32, 3)


def test_a_signal_to_one_process_stops_all_after_the_same_step(finished, tmp_path):
    out = copied(finished, tmp_path / "out")
    command = ("train", write_recipe(tmp_path), "--out", out, "--device", "cpu", "train.steps=1000000")
    processes = pair(*command)
    wait_for(lambda: (out / "training" / "log.jsonl").exists() and lines(out / "training"), processes)
    processes[1].send_signal(signal.SIGUSR1)
    messages = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], messages
    assert sum("run the same command to go on" in message for message in messages) == 1


def begun(finished, out):
    """A run whose transformer was stopped before its first checkpoint."""
    copied(finished, out)
    record = files.read_json(finished.folder.training / "stage.json", "stage") | {"finished": None}
    files.write_json(out / "training" / "stage.json", record)
    return out


def test_all_processes_refuse_another_recipe(finished, tmp_path):
    out = begun(finished, tmp_path / "out")
    processes = pair("train", write_recipe(tmp_path), "loss.cosine=0.5", "--out", out, "--device", "cpu")
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], messages
    assert sum("loss.cosine was 1.0 before and is 0.5 now" in message for message in messages) == 1


def test_an_error_of_one_process_ends_all(finished, tmp_path):
    out = begun(finished, tmp_path / "out")
    damaged = out / "training" / "checkpoints" / "step-000000002"  # which only the leading process finds out
    damaged.mkdir(parents=True)
    processes = pair("train", write_recipe(tmp_path), "--out", out, "--device", "cpu")
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], messages
    assert sum("no intact checkpoint" in message for message in messages) == 1
    assert "Traceback" not in "".join(messages)
