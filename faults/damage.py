"""Files that are truncated, changed by one bit, or missing: detected, and made again or named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from faults.commands import Failure
from faults.runs import Place, Scenario
from sfd.utils import files

KINDS = ("cut short", "missing", "one bit flipped")


@dataclass(frozen=True)
class Artefact:
    """A file of a run that is damaged before a stage which reads it."""

    name: str
    path: str  # a pattern; the last match is damaged
    stage: str  # the one that reads it
    cure: str = ""  # what is removed when the stage refuses, as its message says
    again: tuple[str, ...] = ()  # the stages that then make it again
    interrupted: bool = False  # the stage had nearly ended before
    hashed: bool = False  # has a SHA-256 that is compared, so that a single bit is noticed

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of damage that are noticed."""
        return KINDS[: 3 if self.hashed else 2]


WEIGHTS = "model.safetensors"
ARTEFACTS = (
    Artefact("checkpoint", "training/checkpoints/step-*.safetensors", "train", interrupted=True, hashed=True),
    Artefact("shard of latents", "latents/shard-*.safetensors", "train", "latents/shard-*.safetensors", ("prepare",)),
    Artefact("shard of an unfinished set", "latents/shard-*.safetensors", "prepare", interrupted=True),
    Artefact("manifest of latents", "latents/manifest.json", "train", "latents/manifest.json", ("prepare",)),
    Artefact("stage's record", "latents/stage.json", "train", "latents", ("prepare",)),
    Artefact("encoder", f"texture/{WEIGHTS}", "prepare", f"texture/{WEIGHTS}", ("train-texture",), hashed=True),
    Artefact("encoder's configuration", "texture/config.json", "prepare", "texture/config.json", ("train-texture",)),
    Artefact("model", f"model/{WEIGHTS}", "report", "model", ("train",), hashed=True),
    Artefact("model's record", "model/model.json", "report", "model", ("train",)),
    Artefact("record of samples", "samples/guided/samples.json", "report", "samples", interrupted=True),
)


def harm(path: Path, kind: str, random: Random) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind == "cut short":
        path.write_bytes(data[: random.randrange(len(data))])
    elif kind == "one bit flipped":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)


def damaged(artefact: Artefact) -> Callable[[Place], str]:
    """Damage a file in each way in turn; do what the message says, if there is one."""

    def attempt(place: Place) -> str:
        out = place.before(artefact.stage)
        if artefact.interrupted:
            _nearly_done(artefact.stage, place)
        path = sorted(out.glob(artefact.path))[-1]
        kind = artefact.kinds[place.number % len(artefact.kinds)]
        harm(path, kind, place.random)
        work = place.run(artefact.stage)
        ended = place.do(work).ended(0, 2)
        message = next((line for line in ended.output.splitlines() if "passed over" in line), "")
        if ended.code == 2:
            message = ended.message
            ended.refused()
            named = [str(path.parent.relative_to(place.folder)), *(f"`sfd {stage}`" for stage in artefact.again)]
            if not any(word in message for word in named):
                raise Failure(f"{path} was damaged, but the message does not name it: {message}")
            for cured in out.glob(artefact.cure):
                shutil.rmtree(cured) if cured.is_dir() else cured.unlink()
            for stage in (*artefact.again, artefact.stage):
                place.do(place.run(stage)).succeeded()
        for stage in (*artefact.again, artefact.stage):
            place.check(stage)
        return f"{kind}: {message or 'made again'}"

    return attempt


def _nearly_done(stage: str, place: Place) -> None:
    """Make the run look as if it had been killed before the stage's end."""
    name = {"train": "training", "prepare": "latents", "report": "samples"}[stage]
    shutil.copytree(place.reference / name, place.out / name)
    if stage == "prepare":
        (place.out / "latents" / "manifest.json").unlink()
    record = place.out / (f"{name}/guided/stage.json" if stage == "report" else f"{name}/stage.json")
    files.write_json(record, files.read_json(record, "stage") | {"finished": None})


def no_checkpoint_left(place: Place) -> str:
    """Damage all checkpoints."""
    out = place.before("train")
    _nearly_done("train", place)
    for path in out.glob("training/checkpoints/*.safetensors"):
        harm(path, "one bit flipped", place.random)
    ended = place.do(place.run("train")).refused("no intact checkpoint")
    shutil.rmtree(out / "training" / "checkpoints")
    place.do(place.run("train")).succeeded()
    place.check("train")
    return ended.message


def images(place: Place) -> str:
    """Lose, or cut short, some samples."""
    out = place.before("report")
    shutil.copytree(place.reference / "samples", out / "samples")
    chosen = place.random.choice(sorted(out.glob("samples/guided/0*.png")))
    harm(chosen, ("missing", "cut short")[place.number % 2], place.random)
    ended = place.do(place.run("report")).ended(0, 2)
    if ended.code == 2:
        ended.refused(chosen.name)
        chosen.unlink()
        place.do(place.run("report")).succeeded()
    place.check("report")
    return ended.message or "made again"


SCENARIOS = [
    *(Scenario(f"a damaged {a.name}: {', '.join(a.kinds)}", damaged(a), 6, quick=a.hashed) for a in ARTEFACTS),
    Scenario("all checkpoints damaged", no_checkpoint_left),
    Scenario("a sample missing or cut short", images, 4),
]
