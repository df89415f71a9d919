"""Few-step students: mean velocities on two clocks, exact on Gaussian data, and `sfd distill` from end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from helpers.exact_flow import COMPOSITE, SCHEDULES, STREAMS, mixture
from helpers.random_model import random_model
from sfd.cli import main as cli
from sfd.data.trajectories import TrajectorySet, shard_paths, write_trajectories
from sfd.flow_map import coarsen, mean_velocity, step_counts, take_steps
from sfd.generation.config import SamplingConfig
from sfd.generation.model import load_model
from sfd.models.dit import LightningDiT
from sfd.models.dit_config import DiTConfig
from sfd.run.distill import make_student
from sfd.sampling import initial_noise
from sfd.schedule import build_schedule
from sfd.training.config import TrainSettings
from sfd.training.tasks.distillation import DistillationTask
from sfd.training.trainer import fit
from sfd.utils.errors import SFDError

SINGLE = mixture(1)
GRID = np.linspace(0, 1, 9).tolist()
OFFSET = build_schedule(SCHEDULES["offset"], STREAMS)


def state(noise, t):
    """x(t) on the exact trajectory of one Gaussian: t·m + √(t²s² + (1 − t)²)·x0; t (…, K)."""
    t = COMPOSITE.per_entry(t)
    return t * SINGLE.means[0] + (t**2 * SINGLE.stds[0] ** 2 + (1 - t) ** 2).sqrt() * noise


def exact_mean(x, t, end):
    """The mean velocity of one Gaussian, from the state alone."""
    entry = COMPOSITE.per_entry(t)
    noise = (x - entry * SINGLE.means[0]) / (entry**2 * SINGLE.stds[0] ** 2 + (1 - entry) ** 2).sqrt()
    return mean_velocity(x, state(noise, end), COMPOSITE.per_entry(end - t))


def gaussian_trajectories(folder, count):
    times = OFFSET.at(torch.tensor(GRID, dtype=torch.float64)).time

    def carried(labels, noise):
        return torch.stack([state(noise.double(), t) for t in times], 1)

    write_trajectories(folder, count, carried, latent=COMPOSITE, states=9, labels=[0], seed=0, batch_size=300)
    return TrajectorySet(folder, count)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_mean_velocity_carries_noise_to_data_in_any_number_of_steps(schedule, steps):
    noise = initial_noise(range(20), COMPOSITE).double()
    grid = np.linspace(0, 1, steps + 1).tolist()
    found = take_steps(exact_mean, noise, build_schedule(SCHEDULES[schedule], STREAMS), COMPOSITE, grid)
    torch.testing.assert_close(found.x, SINGLE.transport(noise), rtol=1e-9, atol=1e-9)
    assert found.nfe == steps


def test_a_stream_at_rest_has_no_mean_velocity_and_stays():
    x = initial_noise(range(3), COMPOSITE)
    elapsed = COMPOSITE.per_entry(torch.tensor([0.0, 0.4]))
    after = x + elapsed
    parts = COMPOSITE.unpack(mean_velocity(x, after, elapsed))
    assert torch.equal(parts["texture"], torch.zeros_like(parts["texture"]))
    torch.testing.assert_close(parts["semantic"], torch.ones_like(parts["semantic"]))


def test_steps_halve():
    assert step_counts(8) == [1, 2, 4, 8] and step_counts(12) == [3, 6, 12]
    assert coarsen(GRID, 2) == [0.0, 0.5, 1.0]
    with pytest.raises(SFDError, match="1, 2, 4, 8 steps, but 3"):
        coarsen(GRID, 3)


def test_a_student_begins_as_its_teacher_whatever_the_end_of_the_step():
    teacher = random_model(0, network={"depth": 2, "guide_block": 1})
    student = make_student(teacher.transformer, GRID).eval()
    x, labels = initial_noise(range(3), teacher.composite), torch.tensor([0, 1, 3])
    t = torch.tensor([[0.0, 0.2], [0.3, 0.6], [0.7, 1.0]])
    with torch.no_grad():
        expected = teacher.transformer(x, t, labels).velocity
        for end in (t, t.clamp(min=0.8), torch.ones_like(t)):
            assert torch.equal(student(x, t, labels, ends=end).velocity, expected)


def test_a_small_student_learns_the_exact_map_of_a_gaussian(tmp_path):
    trajectories = gaussian_trajectories(tmp_path / "t", 2000)
    config = DiTConfig(depth=2, width=32, heads=2, composite=COMPOSITE, num_classes=0, clocks=STREAMS)
    student = make_student(LightningDiT(config), GRID)
    task = DistillationTask(student, trajectories, OFFSET, GRID, seed=0, batch_size=128)
    settings = TrainSettings(
        steps=400, batch_size=128, learning_rate=3e-3, warmup=20, decay="cosine", checkpoint_every=400
    )
    student = fit(task, settings, tmp_path / "run", device="cpu")
    noise = initial_noise(range(200), COMPOSITE)
    exact, labels = SINGLE.transport(noise.double()), torch.zeros(200, dtype=torch.int64)

    def mean(x, t, end):
        return student(x, t.float().expand(200, 2), labels, ends=end.float().expand(200, 2)).velocity

    for steps in (1, 2, 4, 8):
        with torch.no_grad():
            found = take_steps(mean, noise, OFFSET, COMPOSITE, coarsen(GRID, steps)).x
        assert (found - exact).norm() / exact.norm() < 0.1, steps


# --- sfd distill -----------------------------------------------------------------------------------------------------

SETTINGS = ["teacher.steps=8", "teacher.guidance=2", "trajectories=20", "finest=4", "train.steps=4"]
SETTINGS += ["train.batch_size=8", "train.warmup=0", "train.checkpoint_every=2"]


def sfd(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "model"
    random_model(0).save(folder)
    return folder


@pytest.fixture(scope="module")
def distilled(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    result = sfd("distill", teacher, "--out", out, "--device", "cpu", *SETTINGS)
    assert result.exit_code == 0, result.output
    return out


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def test_the_result_is_a_model_that_takes_four_steps_without_guidance(distilled):
    model = load_model(distilled / "model", torch.device("cpu"))
    assert (model.sampling.solver, model.sampling.steps, model.sampling.guidance) == ("flow_map", 4, 1.0)
    states = model.trajectory("disk", seeds=3)
    assert len(states) == 5
    one = model.sample("disk", seeds=3, steps=1, output="latent")
    assert not torch.equal(one, states[-1].x)
    together = model.sample(["ring", "disk"], seeds=[1, 3], output="latent")
    torch.testing.assert_close(together[1:], states[-1].x, rtol=1e-5, atol=1e-5)


def run(teacher, out, *settings):
    result = sfd("distill", teacher, "--out", out, "--device", "cpu", *settings)
    assert result.exit_code == 0, result.output
    return weights(out)


def test_lost_trajectories_are_made_again_to_the_same_bytes(teacher, distilled, tmp_path):
    run(teacher, tmp_path, *SETTINGS, "train.steps=1", "train.decay=constant")
    (shard,) = shard_paths(tmp_path / "trajectories", 20)
    before = shard.read_bytes()
    shard.unlink()
    run(teacher, tmp_path, *SETTINGS, "train.steps=2", "train.decay=constant")
    assert shard.read_bytes() == before


def test_a_stopped_student_resumes_to_the_same_bytes(teacher, tmp_path):
    whole = run(teacher, tmp_path / "whole", *SETTINGS, "train.decay=constant")
    run(teacher, tmp_path / "parts", *SETTINGS, "train.decay=constant", "train.steps=2")
    assert run(teacher, tmp_path / "parts", *SETTINGS, "train.decay=constant") == whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["teacher.steps=9"], "multiple of finest"),
        (["teacher.solver=sde"], "draw no noise"),
        (["teacher.guidance=3"], "teacher.guidance was 2.0"),
        (["teacher.guidance_from=inside"], "second head"),
    ],
)
def test_settings_that_do_not_fit_are_refused(teacher, distilled, options, words):
    result = sfd("distill", teacher, "--out", distilled, "--device", "cpu", *SETTINGS, *options)
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output


def test_a_folder_of_other_files_is_left_alone(teacher, tmp_path):
    (tmp_path / "photo.jpg").touch()
    result = sfd("distill", teacher, "--out", tmp_path, "--device", "cpu", *SETTINGS)
    assert result.exit_code == 2 and "other files" in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "photo.jpg"]


@pytest.mark.parametrize("settings", [{"steps": 3}, {"guidance": 2.0}, {"solver": "heun"}, {"shift": 0.5}])
def test_a_student_takes_its_own_steps_alone(distilled, settings):
    with pytest.raises(SFDError, match="distilled"):
        load_model(distilled / "model", torch.device("cpu")).sample("disk", seeds=0, **settings)


def test_only_a_student_takes_few_steps(teacher, distilled, tmp_path):
    with pytest.raises(SFDError, match="sfd distill"):
        load_model(teacher, torch.device("cpu")).sample(
            "disk", seeds=0, **SamplingConfig(solver="flow_map").model_dump()
        )
    result = sfd("distill", distilled, "--out", tmp_path / "again", "--device", "cpu")
    assert result.exit_code == 2 and "distilled already" in result.output
