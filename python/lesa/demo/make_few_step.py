"""Makes the students for few steps: `python -m lesa.demo.make_few_step`.

The digits model is the teacher. It draws pictures with 48 steps, whose noise levels include those of 8 and 4 steps.
A student learns in two parts. First it learns the mean velocity of the teacher between two of its own noise levels, at
the teacher's states. Then it learns from whole runs of its own, which are compared with the teacher's run from the same
noise at each of its noise levels. Seeded.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from tqdm import tqdm

from lesa.demo import digits, few_step
from lesa.demo.make_weights import round_predictors, train_predictors
from lesa.demo.run import DEMOS, labels
from lesa.inputs import collate

TEACHER_STEPS, SAMPLES, SEED = 48, 1024, 200_000
"""Steps of the teacher, how many samples it draws, and the seed of the first of them."""
RANK = 16
STEP_UPDATES, RUN_UPDATES = {8: 150, 4: 40}, {8: 50, 4: 30}
"""Steps of the optimiser in the first part and in the second, by the steps of the student."""
STEP_BATCH, RUN_BATCH = 64, 16
STEP_RATE, RUN_RATE = 2e-3, 1e-3
"""Largest learning rates of the two parts."""


class LowRank(nn.Module):
    """A parametrization that adds `up @ down` to a weight `[out, in]`. It begins with 0."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def teach(pipe: FluxPipeline, count: int, batch: int = 64) -> torch.Tensor:
    """Latents `[49, count, 64, 4]` of runs of the teacher before each step, and at the end."""
    runs = []
    for first in tqdm(range(0, count, batch), desc="teacher"):
        numbers = range(first, min(first + batch, count))
        noise = [torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(SEED + n)) for n in numbers]
        states = [torch.cat(noise)]

        def keep(pipe, step, timestep, values, states=states):
            states.append(values["latents"])
            return values

        arguments = collate(digits.inputs_for(labels(count)[first : first + len(numbers)]))
        pipe(
            **arguments,
            latents=states[0],
            num_inference_steps=TEACHER_STEPS,
            output_type="latent",
            callback_on_step_end=keep,
        )
        runs.append(torch.stack(states))
    return torch.cat(runs, 1)


def velocity(transformer: FluxTransformer2DModel, latents: torch.Tensor, level: torch.Tensor, label: torch.Tensor):
    """What the transformer says of latents `[B, 64, 4]` at noise levels `[B]`."""
    half = digits.SIDE // 2
    inputs = collate(digits.inputs_for(label.tolist()))
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=inputs["prompt_embeds"],
        pooled_projections=inputs["pooled_prompt_embeds"],
        timestep=level,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, half, half, "cpu", torch.float32),
        txt_ids=torch.zeros(1, 3),
        return_dict=False,
    )[0]


def low_rank(transformer: FluxTransformer2DModel) -> dict[str, LowRank]:
    """Gives each linear layer of the blocks a low-rank update, which is all that learns; by the layers' names."""
    transformer.requires_grad_(False)
    updates = {}
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, nn.Linear) and "transformer_blocks." in name:
            updates[name] = LowRank(layer.weight, RANK)
            parametrize.register_parametrization(layer, "weight", updates[name])
    return updates


def rates(peak: float, updates: int, warm_up: int = 20) -> Iterator[float]:
    """Learning rates that rise for some updates and fall along a cosine."""
    for update in range(updates):
        yield peak * min(1, (update + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * update / updates))


def learn(transformer: FluxTransformer2DModel, states: torch.Tensor) -> None:
    """Trains the parameters that require a gradient.

    Args:
        transformer: of the student.
        states: `[steps + 1, count, 64, 4]`, latents of the teacher at the student's noise levels and at the end.
    """
    steps, count = len(states) - 1, states.shape[1]
    levels, target = torch.linspace(1, 0, steps + 1), (states[:-1] - states[1:]) * steps
    label = torch.tensor(labels(count))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98))

    def update(loss: torch.Tensor, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    progress = tqdm(rates(STEP_RATE, STEP_UPDATES[steps]), total=STEP_UPDATES[steps], desc=f"{steps} steps, velocities")
    for number, rate in enumerate(progress):
        step, sample = torch.randint(steps, (STEP_BATCH,)), torch.randint(count, (STEP_BATCH,))
        # For so few tokens these two are faster on a CPU than float32 and flash attention, by 1.9 together.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            made = velocity(transformer, states[step, sample], levels[step], label[sample])
        loss = (made.float() - target[step, sample]).square().mean()
        update(loss, rate)
        if number % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    progress = tqdm(rates(RUN_RATE, RUN_UPDATES[steps]), total=RUN_UPDATES[steps], desc=f"{steps} steps, runs")
    for number, rate in enumerate(progress):
        sample = torch.randint(count, (RUN_BATCH,))
        latents, loss = states[0, sample], torch.zeros(())
        for position in range(steps):
            made = velocity(transformer, latents, levels[position].expand(RUN_BATCH), label[sample])
            latents = latents - made / steps
            loss = loss + (latents - states[position + 1, sample]).square().mean()
        update(loss, rate)
        if number % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.5f}")


def make_student(steps: int, runs: torch.Tensor, folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """The updates of a student in bfloat16, by the keys of a file.

    Args:
        steps: of the student; a divisor of `TEACHER_STEPS`.
        runs: of the teacher, as `teach` makes them.
        folder: that has the digits model.
        seed: of the training.
    """
    torch.manual_seed(seed)
    transformer = digits.load_pipeline(folder).transformer
    updates = low_rank(transformer)
    learn(transformer, runs[:: TEACHER_STEPS // steps])
    made = {}
    for name, update in updates.items():
        made[few_step.PREFIX + name + few_step.DOWN] = update.down.detach().to(torch.bfloat16)
        made[few_step.PREFIX + name + few_step.UP] = update.up.detach().to(torch.bfloat16)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS, help="folder that has the digits model")
    parser.add_argument("--predictors-only", action="store_true", help="keep the students that are there")
    options = parser.parse_args()
    teacher = options.out / digits.PIPELINE_DIR.name
    if not options.predictors_only:
        runs = teach(digits.load_pipeline(teacher), SAMPLES)
        for steps in few_step.STUDENTS:
            save_file(make_student(steps, runs, teacher), few_step.file_of(steps, options.out))
    train_predictors(DEMOS["few-step"], options.out)
    round_predictors(DEMOS["few-step"], options.out)


if __name__ == "__main__":
    main()
