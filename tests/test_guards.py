"""What training does about gradients that are not finite."""

import json

import pytest
import torch

from sfd.training import trainer
from sfd.training.batches import ATTEMPT_STEPS
from sfd.training.trainer import REPORT, fit
from sfd.utils import files
from sfd.utils.errors import Interrupted, SFDError
from test_training import CPU, Regression, changed, log, same_weights

SETTINGS = changed(steps=40, max_skipped=4, log_every=5, checkpoint_every=8)


class Poisoned(Regression):
    """Some batches have a loss, or a gradient, that is not finite."""

    def __init__(self, poisoned, kind="loss", **options):
        super().__init__(**options)
        self.poisoned, self.kind = poisoned, kind

    def batch(self, step, samples):
        return super().batch(step, samples) | {"indices": torch.arange(samples.start, samples.stop)}

    def loss(self, model, batch):
        loss = super().loss(model, batch)["loss"]
        if batch["step"].item() in self.poisoned:
            root = (loss - loss).sqrt()  # 0, with an infinite gradient
            loss = loss + (float("inf") if self.kind == "loss" else root)
        return {"loss": loss}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_poisoned_step_changes_no_weight(tmp_path, kind):
    settings = changed(steps=6, ema=None, decay="constant")
    clean = fit(Poisoned(()), changed(steps=5, ema=None), tmp_path / "clean", device=CPU)
    poisoned = fit(Poisoned({5}, kind), settings, tmp_path / "poisoned", device=CPU)
    assert same_weights(clean, poisoned)
    assert log(tmp_path / "poisoned")[-1]["skipped"] == 1


def test_a_poisoned_step_changes_no_weight_where_the_optimizer_cannot_be_told(tmp_path, monkeypatch):
    settings = changed(steps=8)
    told = fit(Poisoned({5}), settings, tmp_path / "told", device=CPU)
    monkeypatch.setattr(trainer, "BLIND", {"cpu"})
    assert same_weights(told, fit(Poisoned({5}), settings, tmp_path / "blind", device=CPU))


def test_a_skipped_step_is_left_out_of_the_log(tmp_path):
    fit(Poisoned({7}), changed(log_every=1), tmp_path, device=CPU)
    lines = log(tmp_path)
    assert "loss" in lines[6] and "loss" not in lines[7] and "loss" in lines[8]


def test_several_bad_steps_lead_back_and_on_with_other_batches(tmp_path):
    seen = []

    class Noted(Poisoned):
        def loss(self, model, batch):
            seen.append(batch["step"].item())
            return super().loss(model, batch)

    fit(Noted(set(range(16, 20))), SETTINGS, tmp_path, device=CPU)
    again = [16 + i + ATTEMPT_STEPS for i in range(24)]  # from the last good checkpoint
    assert seen == [*range(20), *again]
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert (lines[-1]["rollbacks"], lines[-1]["skipped"]) == (1, 0)


@pytest.mark.parametrize("stop_at", [17, 19, 16 + ATTEMPT_STEPS, 20 + ATTEMPT_STEPS, 26 + ATTEMPT_STEPS])
def test_a_run_that_went_back_resumes_exactly(tmp_path, stop_at):
    bad = {*range(15, 20), 24 + ATTEMPT_STEPS, *range(25 + ATTEMPT_STEPS, 30 + ATTEMPT_STEPS)}
    whole = fit(Poisoned(bad), SETTINGS, tmp_path / "whole", device=CPU)
    with pytest.raises(Interrupted):
        fit(Poisoned(bad, stop_at=stop_at), SETTINGS, tmp_path / "parts", device=CPU)
    assert same_weights(whole, fit(Poisoned(bad), SETTINGS, tmp_path / "parts", device=CPU))
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_bad_steps_that_ended_before_they_were_noticed_are_gone_back_for_once(tmp_path):
    settings = changed(steps=24, max_skipped=3, checkpoint_every=3, log_every=24)
    fit(Poisoned({11, 12, 13}), settings, tmp_path, device=CPU)  # noticed at step 20, after a good checkpoint at 18
    assert log(tmp_path)[-1]["rollbacks"] == 1


def test_a_run_killed_right_after_a_rollback_goes_back_again(tmp_path):
    class Killed(Poisoned):
        def loss(self, model, batch):
            if batch["step"].item() == 18 + ATTEMPT_STEPS:
                raise ZeroDivisionError
            return super().loss(model, batch)

    bad = set(range(16, 20))
    whole = fit(Poisoned(bad), SETTINGS, tmp_path / "whole", device=CPU)
    with pytest.raises(ZeroDivisionError):
        fit(Killed(bad), SETTINGS, tmp_path / "parts", device=CPU)
    assert same_weights(whole, fit(Poisoned(bad), SETTINGS, tmp_path / "parts", device=CPU))
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


class Diverging(Poisoned):
    """Every batch is poisoned."""

    def __init__(self):
        super().__init__(())

    def loss(self, model, batch):
        return {"loss": super().loss(model, batch)["loss"] * float("nan")}


def test_a_run_that_diverges_stops_with_a_report(tmp_path):
    with pytest.raises(SFDError, match=rf"not finite 10 steps in a row.*2 rollbacks did not help; .*{REPORT}"):
        fit(Diverging(), changed(max_rollbacks=2), tmp_path, device=CPU)
    report = files.read_json(tmp_path / REPORT, "report")
    assert (report["step"], report["rollbacks"], report["losses"]) == (10, 2, {"loss": "nan"})
    assert report["norms"]["0.weight"]["gradient"] == "nan" and report["norms"]["0.weight"]["weight"] > 0
    assert report["images"] == list(range(8))


def test_a_report_has_the_losses_of_the_whole_batch(tmp_path):
    class Half(Poisoned):
        def loss(self, model, batch):
            return {"loss": super().loss(model, batch)["loss"] * (float("nan") if batch["indices"][0] == 0 else 1)}

    with pytest.raises(SFDError, match="0 rollbacks"):
        fit(Half(()), changed(accumulate=2, max_rollbacks=0), tmp_path, device=CPU)
    assert files.read_json(tmp_path / REPORT, "report")["losses"] == {"loss": "nan"}


def test_a_run_that_diverged_goes_on_with_more_rollbacks(tmp_path):
    with pytest.raises(SFDError, match="0 rollbacks"):
        fit(Poisoned(set(range(10))), changed(max_rollbacks=0), tmp_path, device=CPU)
    fit(Poisoned(set(range(10))), changed(max_rollbacks=1), tmp_path, device=CPU)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["rollbacks"] == 1
