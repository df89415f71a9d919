"""Numbers of the published implementation: a test for each kind of case, for any folder of that format.

`pytest tests/reference --folder DIR --device cuda`; tests/golden/README.md describes every file and tensor.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from cases import Case, Row, bad, files_of, find_cases
from torch import Tensor

from helpers.latents import open_published
from sfd import flow
from sfd.convert import autoencoder
from sfd.convert import transformer as published
from sfd.data.shards import FEATURES
from sfd.encoders import autoencoder_class
from sfd.evaluation.metrics import frechet_distance, gaussian, inception_score, precision_recall
from sfd.guidance import GuidedVelocity, guide
from sfd.models.component import assemble
from sfd.models.dit import LightningDiT, parameter_count
from sfd.models.semvae import SemVAE, SemVAEConfig, reconstruction_losses
from sfd.sampling import integrate
from sfd.schedule import Schedule, StreamTimes, build_schedule
from small_published import published_config, to_published


def test_folder(folder, rows):
    kinds = find_cases(folder)
    if not kinds:
        raise bad(f"{folder} holds no reference cases; give a folder with NAME.json and NAME.io.safetensors")
    problems = [name for name, kind in kinds.items() if kind == "damaged"]
    for name in [name for name, kind in kinds.items() if kind == "unknown"]:
        files = files_of(folder, name)
        if name.startswith("keys_") or {f"{name}.io.safetensors", f"{name}.weights.safetensors"} & set(files):
            problems.append(name)
        rows += [Row(name, file) for file in files]
    if problems:
        raise bad(f"missing or damaged, or of no kind that a test knows: {', '.join(f'{n}.json' for n in problems)}")


def test_transformer(case: Case):
    case.load(device=case.device)
    network = open_transformer(case, "config", "weights")
    with torch.no_grad():
        compare_velocities(case, network)
        compare_samples(case, network)
    compare_losses(case, network)
    case.finish()


def open_transformer(case: Case, field: str, weights: str) -> LightningDiT:
    config = published_config(case[field])
    network = LightningDiT(config)
    network.load_state_dict(published.from_published(case.open(weights), config))
    return network.to(case.device).eval()


def velocity_of(network: LightningDiT, labels: Tensor):
    return lambda x, times: network(x, times.to(x.device).expand(len(x), -1), labels).velocity


def matches(pattern: str, case: Case) -> list[re.Match]:
    return [match for match in map(re.compile(pattern).fullmatch, case.values) if match]


def compare_velocities(case: Case, network: LightningDiT):
    for match in matches(r"velocity|velocity_(cfg|autoguided)(?:_sem(\d+(?:p\d+)?)_tex(\d+(?:p\d+)?))?", case):
        composite, x, y = network.config.composite, case["x"].flatten(1), case["y"]
        clocks = {"texture": "t_texture", "semantic": "t_semantic" if "t_semantic" in case else "t_texture"}
        times = torch.stack([case[clocks[stream]] for stream in composite.names], dim=1).cpu()
        velocity = velocity_of(network, y)
        if match[1] == "cfg":
            guiding = velocity_of(network, torch.full_like(y, network.null_class))
            velocity = guide(velocity, guiding, scale_of(match, composite.names) or case["cfg_scale"], composite)
        elif match[1] == "autoguided":
            guiding = velocity_of(open_transformer(case, "guide_config", "guide_weights"), y)
            scale = scale_of(match, composite.names) or case.values.get("autoguidance_scale", 1.5)
            velocity = guide(velocity, guiding, scale, composite)
        if isinstance(velocity, GuidedVelocity):  # guided throughout, while every image has times of its own
            velocity = velocity.on_interval([True] * len(composite.names), [0.5] * len(composite.names))
        case.compare(match[0], velocity(x, times))


def scale_of(match: re.Match, streams: tuple[str, ...]) -> dict[str, float]:
    """Read sem1p9_tex1p3."""
    given = {"semantic": match[2], "texture": match[3]}
    return {stream: float(scale.replace("p", ".")) for stream, scale in given.items() if scale and stream in streams}


def schedule_of(case: Case, streams: tuple[str, ...]) -> Schedule:
    delta = case["config"]["semfirst_delta_t"]
    return build_schedule({"name": "offset", "delta": delta} if delta else {"name": "synchronous"}, streams)


def compare_losses(case: Case, network: LightningDiT):
    if not matches(r"grad\..*|loss_(velocity|cosine|repa|total)", case):
        return
    composite, repa = network.config.composite, network.projector is not None
    x1, x0 = case["loss_x1"].flatten(1), case["loss_x0"].flatten(1)
    # A schedule computes in float64, which not every device has.
    times = schedule_of(case, composite.names).at(case["loss_base_time"].cpu()).time.to(case.device)
    output = network(flow.interpolate(x1, x0, composite.per_entry(times)), times, case["y"], project=repa)
    target = flow.velocity_target(x1, x0)
    weights = composite.per_entry(torch.tensor([s.weight for s in composite.streams], device=case.device))
    losses = {
        "loss_velocity": flow.velocity_loss(output.velocity, target, weights),
        "loss_cosine": flow.cosine_loss(composite.per_position(output.velocity), composite.per_position(target)),
    }
    if repa:
        losses["loss_repa"] = flow.repa_loss(output.projection, case["loss_features"])
    losses["loss_total"] = torch.stack([loss.mean() for loss in losses.values()]).sum()
    for name, loss in losses.items():
        case.compare(name, loss)
    losses["loss_total"].backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()}
    for name, gradient in to_published(gradients, network.config).items():
        if f"grad.{name}" in case and name not in published.TABLES:
            # Without label dropout, the published table has no row for the null class.
            rows = len(case[f"grad.{name}"]) if name == published.LABELS else None
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
    for match in matches(r"sample_(euler|dopri5)_shift(\d+(?:\.\d+)?)", case):
        composite, shift = network.config.composite, float(match[2])
        velocity, noise = velocity_of(network, case["y"]), case["noise"].flatten(1)
        if match[1] == "dopri5":  # chooses its steps, which a shift does not change
            schedule, options = schedule_of(case, composite.names), case["sampler"]["dopri5"]
            x = integrate(velocity, noise, schedule, composite, solver="dopri5", options=options).x
            case.compare(match[0], x, tolerance=1e-3)
        else:
            points = case["sampler"]["euler_time_points"]
            clock = PublishedClock(composite.names, case["config"]["semfirst_delta_t"], points, shift)
            settings = {"solver": "euler", "steps": points - 1, "shift": shift or 1.0}
            case.compare(match[0], integrate(velocity, noise, clock, composite, **settings).x)


@torch.no_grad()
def test_semvae(case: Case):
    case.load(device=case.device)
    model = assemble(lambda: SemVAE(semvae_config(case)), case.open(), case.name).to(case.device)
    features = case["features"].mT.unflatten(2, case["mean"].shape[2:])
    moments = model.moments(features)
    reconstruction = model.decode(case["mean"])  # the reference's: random weights amplify its last bits
    mse, cosine = reconstruction_losses(reconstruction, features)
    case.compare("mean", moments.mean)
    case.compare("logvar", moments.logvar)
    case.compare("kl_per_image", moments.kl())
    case.compare("reconstruction_from_mean", reconstruction.flatten(2).mT)
    case.compare("mse", mse)
    case.compare("cosine_loss_last_dim", cosine)
    case.compare("cosine_loss", reconstruction_losses(reconstruction, features, "tokens")[1])
    case.compare("params", parameters(model))
    case.finish()


def semvae_config(case: Case) -> SemVAEConfig:
    fields = ("input_dim", "latent_dim", "hidden_dim", "heads", "blocks")
    names = ("input_channels", "latent_channels", "width", "heads", "blocks")
    return SemVAEConfig(**{name: case[field] for name, field in zip(names, fields, strict=True)})


@torch.no_grad()
def test_autoencoder(case: Case):
    case.load(device=case.device)
    state = case.open()
    config = autoencoder.inferred_config({name: tuple(tensor.shape) for name, tensor in state.items()})
    compare_autoencoder_sizes(case, config)
    network = autoencoder.from_published(state, config).to(case.device)
    posterior = network.encode(case["images"]).latent_dist
    case.compare("mean", posterior.mean)
    case.compare("logvar", posterior.logvar)
    if "reconstruction_from_mean" in case:  # of the reference's: random weights amplify its last bits
        case.compare("reconstruction_from_mean", network.decode(case["mean"]).sample)
    case.finish()


def compare_autoencoder_sizes(case: Case, config: dict):
    widths, kinds = config["block_out_channels"], config["down_block_types"]
    case.compare("channel_multipliers", [width / case["base_channels"] for width in widths])
    case.compare("latent_channels", config["latent_channels"])
    if "attention_resolutions" in case:
        sides = [case["resolution"] // 2**level for level in range(len(kinds))]
        attention = {side for side, kind in zip(sides, kinds, strict=True) if kind.startswith("Attn")}
        given = set(case["attention_resolutions"]) & set(sides)  # the network may not come down to some
        case.rows.append(Row(case.name, "attention_resolutions", len(attention ^ given)))


def test_shards(case: Case):
    case.load("expected")
    latents = open_published(case.folder / case.name)
    composite, everything = latents.composite({}, {}), np.arange(len(latents))
    case.compare("labels", latents.labels)
    for suffix, flip in (("plain", False), ("flip", True)):
        flips = np.full(len(latents), flip)
        stored = {name: latents.read(name, everything, flips) for name in composite.names}
        case.compare(f"composite_{suffix}", composite.pack(composite.normalize(stored)))
        if latents.manifest.features is not None:
            case.compare(f"features_{suffix}", latents.read(FEATURES, everything, flips))
    for stream in composite.streams:
        case.compare(f"{stream.name}_mean", stream.mean)
        case.compare(f"{stream.name}_std", stream.std)
    case.finish()


def test_metrics(case: Case):
    case.load(dtype=torch.float64)
    for name in matches(r"frechet_distance", case):
        distance = frechet_distance(gaussian(case["reference_features"]), gaussian(case["sample_features"]))
        case.compare(name[0], distance, tolerance=1e-6)
    for name in matches(r"inception_score_split_(\d+)", case):
        case.compare(name[0], inception_score(case["sample_probabilities"], int(name[1])), tolerance=1e-6)
    for name in matches(r"(precision|recall)_k(\d+)", case):
        shares = precision_recall(case["reference_features"], case["sample_features"], int(name[2]))
        case.compare(name[0], getattr(shares, name[1]), tolerance=1e-6)
    case.finish()


def test_checkpoint_names(case: Case):
    """Each tensor of a published checkpoint has its place in a network of that size, which is built without memory."""
    sizes = {name: tuple(shape) for name, shape in case["state_dict"].items()}
    given = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    if "num_heads" in case:
        # How channels divide into streams changes no published name or shape.
        config = published.inferred_config(sizes, semantic=1 if "t_embedder_sem.mlp.0.weight" in sizes else 0)
        network, given = on_meta(lambda: LightningDiT(config)), published.renamed(given, config)
        for field, ours in (("depth", config.depth), ("hidden_size", config.width), ("num_heads", config.heads)):
            case.compare(field, ours)
        # The published count holds the position table, which is no parameter here.
        case.compare("parameters", parameter_count(config) + config.composite.token_grid**2 * config.width)
    elif "channel_multipliers" in case:
        config = autoencoder.inferred_config(sizes)
        network = on_meta(lambda: autoencoder_class()(**config))
        given = autoencoder.renamed(given, len(config["block_out_channels"]))
        compare_autoencoder_sizes(case, config)
        case.compare("parameters", parameters(network))
    else:
        network = on_meta(lambda: SemVAE(semvae_config(case)))
        case.compare("encoder_parameters", parameters(network.encoder))
        case.compare("decoder_parameters", parameters(network.decoder))
    theirs, ours = ({(n, tuple(t.shape)) for n, t in state.items()} for state in (given, network.state_dict()))
    case.rows.append(Row(case.name, "tensors that differ in name or shape", len(theirs ^ ours)))
    case.finish()


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()
