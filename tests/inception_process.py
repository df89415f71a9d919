"""Runs with torch-fidelity in a process of its own, for tests/test_inception.py.

The torchvision that torch-fidelity imports may be built for another PyTorch than the one here. Its Python, which is all
that is used of it, imports once its compiled operators have names. Nothing outside of this process may see that.

    python inception_process.py PACKAGES FOLDER
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

PACKAGES, FOLDER = sys.argv[1], Path(sys.argv[2])
sys.path.append(PACKAGES)
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

from helpers.cli import sfd  # noqa: E402
from sfd.evaluation.extractors._base import pretrained  # noqa: E402

IMAGES = np.random.default_rng(0).integers(256, size=(6, 24, 24, 3), dtype=np.uint8)
NAMES = ["2048", "logits_unbiased"]


class Unfilled(FeatureExtractorInceptionV3):
    """The network with random weights."""

    def load_state_dict(self, *arguments):
        """Leave the weights as they are."""


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (FOLDER / "unpickled",)


def random_weights():
    """Random weights as the published file has them: a plain dictionary, without counters."""
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    state = Unfilled("random", NAMES, feature_extractor_weights_path=nothing).state_dict()
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


def by_hand(network):
    """All three kinds of features, from the network's parts."""
    kept = {}
    network.Mixed_6c.register_forward_hook(lambda module, inputs, output: kept.update(before=output))
    pooled, _ = network(torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    branch = network.Mixed_6d.branch1x1
    spatial = torch.relu(branch.bn(branch.conv(kept["before"])))
    return {
        "features": pooled.numpy(),
        "spatial": np.stack([image[:7].transpose(1, 2, 0).ravel() for image in spatial.numpy()]),
        "probabilities": (pooled @ network.fc.weight.T).softmax(dim=1).numpy(),
    }


def run():
    """Write what was seen into FOLDER."""
    state = random_weights()
    weights = FOLDER / "weights.pth"
    torch.save(state, weights)
    judge = pretrained("inception", str(weights), torch.device("cpu"))
    seen = judge.extract(IMAGES)._asdict()
    np.savez(FOLDER / "seen.npz", **seen)
    np.savez(FOLDER / "by-hand.npz", **by_hand(judge._network))

    shift = {"": 0.1, "_s": 0.2}  # moments of the samples themselves, means moved by so much in every dimension
    moments = {}
    for end, features in (("", seen["features"]), ("_s", seen["spatial"])):
        wide = features.astype(np.float64)
        moments |= {f"mu{end}": wide.mean(axis=0) + shift[end], f"sigma{end}": np.cov(wide, rowvar=False)}
    np.savez(FOLDER / "samples.npz", arr_0=IMAGES, arr_1=np.arange(6) % 3)
    np.savez(FOLDER / "reference.npz", arr_0=IMAGES, **moments)

    (FOLDER / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({**state, "fc.weight": state["fc.weight"][:1000]}, FOLDER / "other.pth")

    def evaluate(*options):
        given = ("--reference", FOLDER / "reference.npz", "--extractor", "inception", "--device", "cpu")
        result = sfd("evaluate", FOLDER / "samples.npz", *given, *options)
        return result.exit_code, result.output

    published = FOLDER / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    published.parent.mkdir(parents=True)
    published.symlink_to(weights)
    torch.hub.set_dir(FOLDER / "hub")
    results = {
        "fetched": evaluate("--out", FOLDER / "metrics.json"),
        **{name: evaluate("--weights", FOLDER / f"{name}.pth") for name in ("evil", "other")},
    }
    (FOLDER / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with torch.no_grad():
        run()
