"""Several ranks give the result of one; they stop, fail and resume together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from helpers import worker
from helpers.compare import contents
from helpers.latents import make_latents
from helpers.launch import TESTS, environment, pair, torchrun
from helpers.training import read_log, timeless_log
from sfd.data.shapes import ShapesSource
from sfd.generation.folder import read_images
from sfd.utils import files
from tiny import write_recipe

PAGE = TESTS.parent / "docs" / "scale.md"
STEPS = {"steps": 30, "batch_size": 8, "learning_rate": 1e-3, "ema": 0.9, "log_every": 10, "checkpoint_every": 20}
FEW = STEPS | {"steps": 16, "log_every": 4}
LATE = FEW | {"log_every": 16}  # a line that averages over all steps


def distance(a, b):
    """The largest relative difference of a tensor."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-9)) for name in b)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Training by one rank, by two, and by a number that changes on resuming."""
    folder = tmp_path_factory.mktemp("jobs")
    make_latents(ShapesSource(24, 0, 16), folder / "latents")
    results = {name: worker.train(folder, name, s).state_dict() for name, s in (("one", STEPS), ("few", FEW))}
    results["micro-batches"] = worker.train(folder, "micro-batches", STEPS | {"accumulate": 2}).state_dict()
    assert worker.train(folder, "changing", FEW, (3, 0)) is None
    together = [
        ("two", STEPS, None),
        ("changing", FEW | {"accumulate": 2}, (9, 0)),
        ("uninterrupted", LATE, None),
        ("interrupted", LATE, (5, 1)),
        ("interrupted", LATE, None),
    ]
    (folder / "jobs.json").write_text(json.dumps(together))
    ended = torchrun(TESTS / "helpers" / "worker.py", folder)
    assert ended.returncode == 0, ended.stderr
    results["changing"] = worker.train(folder, "changing", FEW).state_dict()
    for name in ("two", "uninterrupted", "interrupted"):
        first, second = (files.read_tensors(folder / f"{name}-{rank}.safetensors") for rank in range(2))
        assert distance(first, second) == 0
        results[name] = first
    return folder, results


@pytest.mark.parametrize(("name", "reference"), [("micro-batches", "one"), ("two", "one"), ("changing", "few")])
def test_training_does_not_depend_on_how_a_batch_is_divided(jobs, name, reference):
    assert distance(jobs[1][name], jobs[1][reference]) < 1e-5
    for a, b in zip(timeless_log(jobs[0] / name), timeless_log(jobs[0] / reference), strict=True):
        assert a == {key: pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in b}


def test_interrupted_training_by_two_ranks_gives_the_same_bytes(jobs):
    folder, results = jobs
    assert distance(results["interrupted"], results["uninterrupted"]) == 0
    assert timeless_log(folder / "interrupted") == timeless_log(folder / "uninterrupted")


def wait_for(condition, processes):
    while not condition() and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    assert condition(), [process.communicate() for process in processes]


SCRIPTS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_the_documented_scripts_are_valid(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_two_ranks_run_all_stages(finished, copied, tmp_path):
    out = copied("latents", "training", "model", "samples", "metrics", "report.html")
    both = pair("run", write_recipe(tmp_path), "--out", out, "--device", "cpu")
    messages = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    assert ["encoding latents" in message for message in messages] == [True, False], "rank 0 alone prints"
    ours, theirs = (contents(root / "latents") for root in (out, finished.folder.root))
    assert ours == theirs
    for name in ("guided", "unguided"):
        images, others = (read_images(root / "samples" / name, range(20)) for root in (out, finished.folder.root))
        assert np.abs(images.astype(int) - others).max() <= 1
        assert (out / "samples" / name / "grid.png").exists()


WAITING = """
import time
from datetime import timedelta
from sfd.utils import distributed
distributed.COLLECTIVE_TIMEOUT = timedelta(seconds=1)
distributed.init("cpu")
time.sleep(3 * distributed.rank())
distributed.barrier()
assert distributed.broadcast({"rank": distributed.rank()}) == {"rank": 0}
assert distributed.all_reduce_max(distributed.rank()) == 1
distributed.shutdown()
"""


def test_a_barrier_may_take_longer_than_a_collective(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    ended = torchrun(script)
    assert ended.returncode == 0, ended.stderr


def test_after_a_rank_is_killed_the_launcher_restarts_and_the_result_is_the_same(finished, copied, tmp_path):
    out = copied("training", "model", "samples")
    script = tmp_path / "train.sbatch"
    script.write_text(SCRIPTS[0])
    job = environment(RECIPE=str(write_recipe(tmp_path)), RUN=str(out), GPUS="2", HOURS="0.5")
    job["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), job["PATH"]])  # noqa: PTH120
    command = ["bash", script, "--device", "cpu"]
    process = subprocess.Popen(command, env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list((out / "training" / "checkpoints").glob("step-00000000[24]*")), [process])
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    weights = [files.read_tensors(run / "model" / "model.safetensors") for run in (out, finished.folder.root)]
    assert distance(*weights) < 1e-4


def test_a_signal_to_one_rank_stops_all_ranks(copied, tmp_path):
    out = copied("training", "model", "samples")
    command = ("train", write_recipe(tmp_path), "--out", out, "--device", "cpu", "train.steps=1000000")
    processes = pair(*command)
    wait_for(lambda: (out / "training" / "log.jsonl").exists() and read_log(out / "training"), processes)
    processes[1].send_signal(signal.SIGUSR1)
    messages = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], messages
    assert sum("run the same command to resume" in message for message in messages) == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_the_death_of_one_rank_ends_the_other(copied, tmp_path, failing):
    out = copied("training", "model", "samples")
    processes = pair("train", write_recipe(tmp_path), "--out", out, "--device", "cpu", "train.steps=1000000")
    wait_for(lambda: (out / "training" / "log.jsonl").exists() and read_log(out / "training"), processes)
    processes[failing].send_signal(signal.SIGKILL)
    message = processes[1 - failing].communicate(timeout=60)[1]
    assert processes[1 - failing].returncode == 1 and "a rank of this run failed" in message
    processes[failing].communicate()


@pytest.mark.parametrize(
    ("override", "message"), [("seed=0", "no intact checkpoint"), ("loss.cosine=x", "loss.cosine")]
)
def test_an_error_of_rank_0_ends_all_ranks_and_is_printed_once(finished, copied, tmp_path, override, message):
    out = copied("training", "model", "samples")
    (out / "training" / "checkpoints").mkdir(parents=True)
    (out / "training" / "checkpoints" / "step-000000002.safetensors").write_bytes(b"damaged")
    record = files.read_json(finished.folder.training / "stage.json", "stage") | {"finished": None}
    files.write_json(out / "training" / "stage.json", record)
    processes = pair("train", write_recipe(tmp_path), override, "--out", out, "--device", "cpu")
    messages = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], messages
    assert message in messages[0] and "Traceback" not in "".join(messages) and "error:" not in messages[1]
