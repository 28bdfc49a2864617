"""Trains the coefficients of `mixer="universal"`: `python benchmarks/studies/train_universal.py --out DIR`.

Records 16 samples of each bundled model with 50 steps: as the demo runs it, with shifts of 2 and 3, and with guidance
on where the demo has none or off where it has some. Then it takes random schedules of these runs, and of every second
step of them. They compute between a tenth and a half of the steps. The loss compares velocities, which the model's head
makes of true and of forecast features: their error summed up over the whole run, and over each gap. Nothing in it runs
the model with its own forecasts.

`--leave-out MODEL` trains on the other model alone, to judge the coefficients on a model that they have not seen. A
minute of one core for the recording of each setting at most, and another one for the training.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tqdm import tqdm

from lesa.demo.run import DEMOS, OF_50_STEPS, labels
from lesa.inputs import collate
from lesa_kernels.forecasters import universal
from lesa_kernels.predictor.reference import newton_weights

STEPS = 50
SAMPLES, SEED = 16, 20_000
SETTINGS = ((1.0, "as the demo"), (3.0, "as the demo"), (1.0, "other guidance"), (2.0, "as the demo"))
COUNTS = (5, 27)
"""Limits of the computed steps of 50: at least the first, and less than the second."""
NEGATIVE_DIGITS_SCALE = 1.5
HIDDEN, STAGES, INPUTS = 16, len(universal.BOUNDS) + 1, 5
TAPS = universal.LONGEST - 1
NOISE = 0.003
"""Of each computed velocity, relative to it: what the weights of the run make of it is added to the squared error."""


class Run(NamedTuple):
    """A recorded run.

    Args:
        sigmas: `[S + 1]`.
        features: `[S, G, N, T, D]`, G is 2 with guidance.
        scale, shift: `[S, G, N or 1, 1, D]`, of the head's modulation; 1 is added to the scale.
        velocities: `[S, N, T, C]`, which the scheduler got.
        weight, bias: of the head's projection.
        guide: makes the scheduler's velocity of those of both streams.
    """

    sigmas: torch.Tensor
    features: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    velocities: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    guide: object


def inputs_for(name: str, other_guidance: bool, samples: int = SAMPLES) -> tuple[list[dict], float | None]:
    """Inputs of so many samples, and the scale of their guidance."""
    module, classes = DEMOS[name].model, labels(samples)
    inputs = [dict(one) for one in module.inputs_for(classes)]
    if name == "photos":
        return [{**one, "true_cfg_scale": 1.0} for one in inputs] if other_guidance else inputs, (
            None if other_guidance else module.GUIDANCE
        )
    if not other_guidance:
        return inputs, None
    for one, negative in zip(inputs, module.inputs_for([(c + 5) % module.NUM_CLASSES for c in classes])):
        one["negative_prompt_embeds"] = negative["prompt_embeds"]
        one["negative_pooled_prompt_embeds"] = negative["pooled_prompt_embeds"]
        one["true_cfg_scale"] = NEGATIVE_DIGITS_SCALE
    return inputs, NEGATIVE_DIGITS_SCALE


@torch.no_grad()
def record(name: str, shift: float, other_guidance: bool) -> Run:
    """Runs all steps of a bundled model."""
    pipe = DEMOS[name].model.load_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    inputs, guidance = inputs_for(name, other_guidance)
    head, projection = pipe.transformer.norm_out, pipe.transformer.proj_out
    features, conditions, velocities, step = [], [], [], pipe.scheduler.step

    def stepped(velocity, *args, **options):
        velocities.append(velocity.clone())
        return step(velocity, *args, **options)

    def entered(module, args):
        features.append(args[0].clone())
        conditions.append(args[1].clone())

    hook = head.register_forward_pre_hook(entered)
    pipe.scheduler.step = stepped
    generators = [torch.Generator().manual_seed(SEED + number) for number in range(SAMPLES)]
    options = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    pipe(**collate(inputs), **options, generator=generators)
    hook.remove()
    streams = len(features) // STEPS
    scale, moved = head.linear(head.silu(torch.stack(conditions))).unflatten(0, (STEPS, streams)).chunk(2, -1)

    def guide(both):
        if both.shape[1] == 1:
            return both[:, 0]
        wanted, unwanted = both.unbind(1)
        mixed = unwanted + guidance * (wanted - unwanted)
        if name == "digits":
            return mixed
        return mixed * (wanted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))

    return Run(
        pipe.scheduler.sigmas,
        torch.stack(features).unflatten(0, (STEPS, streams)),
        scale[:, :, :, None] + 1,
        moved[:, :, :, None],
        torch.stack(velocities),
        projection.weight,
        projection.bias,
        guide,
    )


def random_schedule(levels: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Computed steps of a run with these noise levels: mostly few ones, whose gaps rise and fall at random."""
    total = len(levels)
    count = int(np.exp(rng.uniform(*(np.log(np.ceil(limit * total / STEPS)) for limit in COUNTS))))
    at = (np.arange(count) + 0.5) / count
    gaps = at ** rng.uniform(0.4, 0.9) * (1 - at) ** rng.uniform(0.1, 0.6) * np.exp(rng.normal(0, 0.15, count))
    by_level = rng.choice([0, 0.5, 1])
    parts = (1 - by_level) * np.arange(total) / total + by_level * (1 - levels)
    ends = (gaps.cumsum() / gaps.sum())[:-1]
    return sorted({0, *(max(1, int(np.abs(parts - end).argmin())) for end in ends)})


def skipped(schedule: list[int], levels: list[float]) -> tuple[torch.Tensor, ...]:
    """Of each skipped step: its index, its anchors `[P, 4]`, their levels, their count, its level, and its gap."""
    rows, done = [], []
    for step, level in enumerate(levels):
        if step in schedule:
            done.insert(0, step)
            continue
        anchors = done[: universal.LONGEST]
        missing = universal.LONGEST - len(anchors)
        known = [levels[a] for a in anchors] + [levels[anchors[-1]] + 0.1 * (k + 1) for k in range(missing)]
        rows.append((step, anchors + [anchors[-1]] * missing, known, len(anchors), level, len(done) - 1))
    step, anchors, known, count, level, gap = (torch.tensor(column) for column in zip(*rows))
    return step, anchors, known.double(), count.int(), level.double(), gap


def loss_of(run: Run, coefficients: tuple[torch.Tensor, ...], rng: np.random.Generator) -> torch.Tensor:
    """Of one random schedule, for 4 samples and 16 tokens."""
    stride = 1 if rng.random() < 0.7 else 2
    levels = run.sigmas[:-1][::stride]
    schedule = random_schedule(levels.numpy(), rng)
    step, anchors, known, count, level, gap = skipped(schedule, levels.tolist())
    scales = universal.tap_scales(known, count, level, coefficients)
    weights = (scales[:, None] @ newton_weights(known.T, count, level)).squeeze(1)
    weights = weights + F.one_hot(torch.zeros_like(step), universal.LONGEST)
    weights = weights * (torch.arange(universal.LONGEST) < count[:, None])
    matrix = torch.zeros(len(step), len(levels), dtype=torch.float64).scatter_add(1, anchors, weights)
    matrix = matrix[:, schedule].float()  # [P, computed steps]

    rows = torch.from_numpy(rng.choice(SAMPLES, 4, replace=False))
    tokens = torch.from_numpy(rng.choice(run.features.shape[3], 16, replace=False))
    computed, target = torch.tensor(schedule) * stride, step * stride
    features = torch.einsum("pk,kgntd->pgntd", matrix, run.features[computed][:, :, rows][:, :, :, tokens])
    modulation = [part[target] for part in (run.scale, run.shift)]
    scale, shift = (part[:, :, rows] if part.shape[2] > 1 else part for part in modulation)
    normed = F.layer_norm(features, features.shape[-1:], eps=1e-6)
    made = run.guide(F.linear(normed * scale + shift, run.weight, run.bias))
    true = run.velocities[target][:, rows][:, :, tokens]

    width = torch.cat([levels, levels.new_zeros(1)]).diff()[step]
    error = (made - true) * width[:, None, None, None]
    gaps = error.new_zeros(len(schedule), *error.shape[1:]).index_add(0, gap, error)
    passed_on = matrix.new_zeros(len(schedule), len(schedule)).index_add(0, gap, matrix * width[:, None])
    noise = NOISE**2 * true.square().mean() * passed_on.square().sum()
    whole, each = gaps.sum(0).square().mean(), gaps.square().mean((1, 2, 3)).sum()
    towards_line = (scales - torch.eye(TAPS)[0]).square().mean()
    return 0.5 * torch.log(whole + noise) + 0.5 * torch.log(each + noise) + 1e-3 * towards_line


def train(runs: list[Run], iterations: int, seed: int = 0, rate: float = 5e-3) -> dict[str, torch.Tensor]:
    """The coefficients, by name."""
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    coefficients = {
        "in_weight": torch.randn(STAGES, HIDDEN, INPUTS, generator=random) * 0.7,
        "in_bias": torch.randn(STAGES, HIDDEN, generator=random) * 0.5,
        "spline": torch.randn(STAGES, HIDDEN, universal.GRID_SIZE + universal.SPLINE_ORDER, generator=random) * 0.1,
        "out_weight": torch.zeros(STAGES, TAPS, HIDDEN),
        "out_bias": torch.eye(TAPS)[0].repeat(STAGES, 1),  # a straight line
    }
    values = [value.requires_grad_() for value in coefficients.values()]
    optimizer = torch.optim.Adam(values)
    progress = tqdm(range(iterations), desc="training", mininterval=5)
    average = None
    for iteration in progress:
        optimizer.param_groups[0]["lr"] = (
            rate * min(1, (iteration + 1) / 50) * np.cos(np.pi * iteration / iterations / 2) ** 2
        )
        loss = loss_of(runs[iteration % len(runs)], tuple(value.double() for value in values), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
    return {name: value.detach() for name, value in coefficients.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder that gets {universal.COEFFICIENTS.name}")
    parser.add_argument("--leave-out", choices=OF_50_STEPS, help="a model that is not trained on")
    parser.add_argument("--iterations", type=int, default=2500, help="random schedules (default: 2500)")
    options = parser.parse_args()
    models = [name for name in OF_50_STEPS if name != options.leave_out]
    settings = [(name, shift, kind == "other guidance") for shift, kind in SETTINGS for name in models]
    runs = [record(*setting) for setting in tqdm(settings, desc="recording", unit="run")]
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(train(runs, options.iterations), options.out / universal.COEFFICIENTS.name)


if __name__ == "__main__":
    main()
