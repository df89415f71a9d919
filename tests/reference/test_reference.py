"""Numbers of the published implementation: a test for each kind of case, for any folder of that format.

`pytest tests/reference --folder DIR --device cuda`; tests/golden/README.md describes every file and tensor.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from cases import Case, Row, bad, find_cases
from torch import Tensor

from sfd import flow
from sfd.convert import autoencoder, semvae
from sfd.convert import transformer as published
from sfd.data.published import open_published
from sfd.data.shards import FEATURES
from sfd.evaluation.metrics import frechet_distance, gaussian, inception_score, precision_recall
from sfd.guidance import guide
from sfd.models.component import differences
from sfd.models.dit import LightningDiT, parameter_count
from sfd.models.semvae import SemVAE, SemVAEConfig, reconstruction_losses
from sfd.sampling import integrate
from sfd.schedules import Schedule, StreamTimes, build_schedule

GUIDED = re.compile(r"velocity_(cfg|autoguided)(?:_sem(\d+(?:p\d+)?)_tex(\d+(?:p\d+)?))?")
SAMPLE = re.compile(r"sample_(euler|dopri5)_shift(\d+(?:\.\d+)?)")
METRIC = re.compile(r"(frechet_distance)|inception_score_split_(\d+)|(precision|recall)_k(\d+)")


def test_folder(folder, rows):
    _, problems, unknown = find_cases(folder)
    rows += [Row("file", name) for name in unknown]
    if problems:
        bad("; ".join(problems))


def test_transformer(case: Case):
    network, io = open_transformer(case, "config", "weights"), case.io()
    with torch.no_grad():
        compare_velocities(case, network)
        compare_samples(case, network)
    inputs = {"x", "y", "t_texture", "t_semantic", "noise", "loss_x1", "loss_x0", "loss_base_time", "loss_features"}
    if any(name.startswith(("loss_", "grad.")) for name in io.keys() - inputs):
        compare_losses(case, network)
    case.finish(*inputs, "cfg_scale", "guide_config", "autoguidance_scale", "sampler")


def open_transformer(case: Case, field: str, weights: str) -> LightningDiT:
    config = published.published_config(case[field])
    network = LightningDiT(config)
    network.load_state_dict(published.from_published(case.weights(weights), config))
    return network.to(case.device).eval()


def velocity_of(network: LightningDiT, labels: Tensor):
    return lambda x, times: network(x, times.to(x.device).expand(len(x), -1), labels).velocity


def compare_velocities(case: Case, network: LightningDiT):
    io, composite = case.tensors, network.config.composite
    names = [name for name in io if name == "velocity" or GUIDED.fullmatch(name)]
    if not names:
        return
    x, y = io["x"].flatten(1), io["y"]
    clocks = {"texture": "t_texture", "semantic": "t_semantic" if "t_semantic" in io else "t_texture"}
    times = torch.stack([io[clocks[stream]] for stream in composite.names], dim=1).cpu()
    conditional = velocity_of(network, y)
    case.compare("velocity", conditional(x, times))
    for match in filter(None, map(GUIDED.fullmatch, names)):
        if match[1] == "cfg":
            guiding, field = velocity_of(network, torch.full_like(y, network.null_class)), "cfg_scale"
        else:
            guiding, field = (
                velocity_of(open_transformer(case, "guide_config", "guide_weights"), y),
                "autoguidance_scale",
            )
        if match[2]:
            both = {"semantic": float(match[2].replace("p", ".")), "texture": float(match[3].replace("p", "."))}
            scale = {stream: both[stream] for stream in composite.names}
        else:
            scale = 1.5 if match[1] == "autoguided" and field not in case.fields else case[field]
        case.compare(match[0], guide(conditional, guiding, scale, composite)(x, times))


def schedule_of(case: Case, streams: tuple[str, ...]) -> Schedule:
    delta = case["config"]["semfirst_delta_t"]
    return build_schedule({"name": "offset", "delta": delta} if delta else {"name": "synchronous"}, streams)


def compare_losses(case: Case, network: LightningDiT):
    io, composite, repa = case.tensors, network.config.composite, network.projector is not None
    x1, x0 = io["loss_x1"].flatten(1), io["loss_x0"].flatten(1)
    # A schedule computes in float64, which not every device has.
    times = schedule_of(case, composite.names).at(io["loss_base_time"].cpu()).time.to(case.device)
    output = network(flow.interpolate(x1, x0, composite.per_entry(times)), times, io["y"], project=repa)
    target = flow.velocity_target(x1, x0)
    weights = composite.per_entry(torch.tensor([s.weight for s in composite.streams], device=case.device))
    losses = {
        "loss_velocity": flow.velocity_loss(output.velocity, target, weights),
        "loss_cosine": flow.cosine_loss(composite.per_position(output.velocity), composite.per_position(target)),
    }
    if repa:
        losses["loss_repa"] = flow.repa_loss(output.projection, io["loss_features"])
    losses["loss_total"] = torch.stack([loss.mean() for loss in losses.values()]).sum()
    for name, loss in losses.items():
        case.compare(name, loss)
    losses["loss_total"].backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
    for name, gradient in published.to_published(gradients, network.config).items():
        if f"grad.{name}" in io and name not in published.TABLES:
            # Without label dropout, the published table has no row for the null class.
            rows = len(io[f"grad.{name}"]) if name == published.LABELS else len(gradient)
            case.compare(f"grad.{name}", gradient[:rows])


class PublishedClock(Schedule):
    """The published Euler's time points, in float32 and blind to knots: streams move by the time of a step's start."""

    def __init__(self, streams: tuple[str, ...], delta: float, points: int, shift: float) -> None:
        super().__init__(streams)
        self.delta, self.t = delta, torch.linspace(0, 1 + delta, points)
        if shift:
            u = self.t / (1 + delta)
            self.t = shift * u / (1 + (shift - 1) * u) * (1 + delta)

    def at(self, u: Tensor, segment: int | None = None) -> StreamTimes:
        t = self.t[(u.float()[..., None] * (1 + self.delta) - self.t).abs().argmin(dim=-1)]
        time = {"texture": (t - self.delta).clamp(min=0), "semantic": t.clamp(max=1)}
        rate = {"texture": (1 + self.delta) * (t >= self.delta), "semantic": (1 + self.delta) * (t <= 1)}
        return StreamTimes(*(torch.stack([each[k] for k in self.streams], dim=-1).to(u.dtype) for each in (time, rate)))


def compare_samples(case: Case, network: LightningDiT):
    io, composite = case.tensors, network.config.composite
    for match in filter(None, map(SAMPLE.fullmatch, list(io))):
        velocity, noise, shift = velocity_of(network, io["y"]), io["noise"].flatten(1), float(match[2])
        if match[1] == "dopri5":  # chooses its steps, which a shift does not change
            schedule, options = schedule_of(case, composite.names), case["sampler"]["dopri5"]
            x = integrate(velocity, noise, schedule, composite, solver="dopri5", options=options).x
            case.compare(match[0], x, tolerance=1e-3)
        else:
            points, delta = case["sampler"]["euler_time_points"], case["config"]["semfirst_delta_t"]
            clock, settings = PublishedClock(composite.names, delta, points, shift), {"shift": shift or 1}
            x = integrate(velocity, noise, clock, composite, solver="euler", steps=points - 1, **settings).x
            case.compare(match[0], x)


@torch.no_grad()
def test_semvae(case: Case):
    model = semvae.from_published(case.weights(), semvae_config(case)).to(case.device)
    io = case.io()
    mean = io["mean"]
    features = io["features"].mT.unflatten(2, mean.shape[2:])
    moments = model.moments(features)
    reconstruction = model.decode(mean)  # the reference's: random weights amplify its last bits
    mse, cosine = reconstruction_losses(reconstruction, features)
    case.compare("mean", moments.mean)
    case.compare("logvar", moments.logvar)
    case.compare("kl_per_image", moments.kl())
    case.compare("reconstruction_from_mean", reconstruction.flatten(2).mT)
    case.compare("mse", mse)
    case.compare("cosine_loss_last_dim", cosine)
    case.compare("cosine_loss", reconstruction_losses(reconstruction, features, "tokens")[1])
    case.compare_exactly("params", parameters(model))
    case.finish("features")


def semvae_config(case: Case) -> SemVAEConfig:
    fields = ("input_dim", "latent_dim", "hidden_dim", "heads", "blocks")
    names = ("input_channels", "latent_channels", "width", "heads", "blocks")
    return SemVAEConfig(**{name: case[field] for name, field in zip(names, fields, strict=True)})


@torch.no_grad()
def test_autoencoder(case: Case):
    state = case.weights()
    config = autoencoder.inferred_config({name: tuple(tensor.shape) for name, tensor in state.items()})
    compare_autoencoder_sizes(case, config)
    network, io = autoencoder.from_published(state, config).to(case.device), case.io()
    posterior = network.encode(io["images"]).latent_dist
    case.compare("mean", posterior.mean)
    case.compare("logvar", posterior.logvar)
    if "reconstruction_from_mean" in io:  # of the reference's: random weights amplify its last bits
        case.compare("reconstruction_from_mean", network.decode(io["mean"]).sample)
    case.finish("images")


def compare_autoencoder_sizes(case: Case, config: dict):
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    case.compare_exactly("base_channels", widths[0] / case["channel_multipliers"][0])
    case.compare_exactly("channel_multipliers", [width / case["base_channels"] for width in widths])
    case.compare_exactly("latent_channels", config["latent_channels"])
    if "attention_resolutions" in case.fields:
        sides = [case["resolution"] // 2**level for level in range(len(kinds))]
        attention = {side for side, kind in zip(sides, kinds, strict=True) if kind.startswith("Attn")}
        given = case["attention_resolutions"]  # in any order; the network may not come down to some
        ours = [side for side in given if side in attention or side not in sides]
        case.compare_exactly("attention_resolutions", ours + sorted(attention - set(given)))


def test_shards(case: Case):
    latents, _ = open_published(case.folder / case.name), case.io("expected", on_device=False)
    composite, everything = latents.composite({}, {}), np.arange(len(latents))
    case.compare("labels", latents.labels, tolerance=0)
    for suffix, flip in (("plain", False), ("flip", True)):
        flips = np.full(len(latents), flip)
        stored = {name: latents.read(name, everything, flips) for name in composite.names}
        case.compare(f"composite_{suffix}", composite.pack(composite.normalize(stored)))
        if latents.manifest.features is not None:
            case.compare(f"features_{suffix}", latents.read(FEATURES, everything, flips))
    for stream in composite.streams:
        case.compare(f"{stream.name}_mean", torch.tensor(stream.mean))
        case.compare(f"{stream.name}_std", torch.tensor(stream.std))
    case.finish()


def test_metrics(case: Case):
    io = case.io(on_device=False)
    for match in filter(None, map(METRIC.fullmatch, case.fields)):
        distance, split_size, share, k = match.groups()
        if distance:
            ours = frechet_distance(gaussian(io["reference_features"]), gaussian(io["sample_features"]))
        elif split_size:
            ours = inception_score(io["sample_probabilities"], int(split_size))
        else:
            ours = getattr(precision_recall(io["reference_features"], io["sample_features"], int(k)), share)
        ours, reference = (torch.tensor(value, dtype=torch.float64) for value in (ours, case[match[0]]))
        case.compare(match[0], ours, tolerance=1e-6, reference=reference)
    case.finish("reference_features", "sample_features", "sample_probabilities")


def test_checkpoint_names(case: Case):
    """Each tensor of a published checkpoint has its place in a network of that size, which is built without memory."""
    given = {name: tuple(shape) for name, shape in case["state_dict"].items()}
    if "num_heads" in case.fields:
        # How channels divide into streams changes no published name or shape.
        config = published.inferred_config(given, semantic=1 if "t_embedder_sem.mlp.0.weight" in given else 0)
        expected = published.published_shapes(config)
        case.compare_exactly("depth", config.depth)
        case.compare_exactly("hidden_size", config.width)
        case.compare_exactly("num_heads", config.heads)
        # The published count holds the position table, which is no parameter here.
        case.compare_exactly("parameters", parameter_count(config) + config.composite.token_grid**2 * config.width)
    elif "channel_multipliers" in case.fields:
        config = autoencoder.inferred_config(given)
        expected = autoencoder.published_shapes(config)
        compare_autoencoder_sizes(case, config)
        case.compare_exactly("parameters", parameters(autoencoder.build(config, "meta")))
    elif "input_dim" in case.fields:
        expected = semvae.published_shapes(semvae_config(case))
        with torch.device("meta"):
            model = SemVAE(semvae_config(case))
        case.compare_exactly("encoder_parameters", parameters(model.encoder))
        case.compare_exactly("decoder_parameters", parameters(model.decoder))
    else:
        bad(f"{case.name}.json lists the tensors of a network, but not its sizes")
    found = differences(given, expected)
    case.rows += [Row(case.name, f"tensors {kind}", float(len(names))) for kind, names in found.items()]
    case.finish()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
