"""Makes the bundled weights of the digits: `python -m lesa.demo.make_weights`.

Flow matching on scikit-learn's handwritten digits, then the predictors of the demo. Seeded. It took about 20 minutes
on 2 cores before there was training through whole runs. How long it takes with it was not measured.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import lesa
from lesa.demo import digits
from lesa.demo.run import DEMOS, Demo, labels
from lesa.training.trainer import with_typical_errors
from lesa_kernels import FusedKANPredictor, PredictorConfig

END_TO_END_SAMPLES, END_TO_END_SEED = 512, 100_000
"""Of the trainings end to end: samples, and the seed of the first of them."""


def training_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the packed images [1797, 64, 4] in [-1, 1] and their labels [1797]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(digits.SIDE, digits.SIDE), mode="bicubic").clamp(-1, 1)
    half = digits.SIDE // 2
    packed = images.view(-1, 1, half, 2, half, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, half * half, 4)
    return packed, torch.tensor(data.target)


def train_transformer(iterations: int, seed: int = 0) -> tuple[FluxTransformer2DModel, torch.Tensor]:
    """Trains the transformer and the class embeddings; returns both in bfloat16."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**digits.TRANSFORMER_CONFIG)
    embedding = nn.Embedding(digits.NUM_CLASSES, digits.EMBEDDING_DIM)
    optimizer = torch.optim.AdamW([*model.parameters(), *embedding.parameters()], lr=1e-3, weight_decay=1e-4)
    images, labels = training_data()
    half = digits.SIDE // 2
    grid = torch.meshgrid(torch.zeros(1), torch.arange(float(half)), torch.arange(float(half)), indexing="ij")
    img_ids, txt_ids = torch.stack(grid, -1).reshape(-1, 3), torch.zeros(1, 3)
    batch = 64
    progress = tqdm(range(iterations), desc="transformer")
    for iteration in progress:
        index = torch.randint(0, len(images), (batch,))
        clean = images[index]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch))
        conditioning = embedding(labels[index])
        velocity = model(
            hidden_states=(1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise,
            encoder_hidden_states=conditioning[:, None],
            pooled_projections=conditioning,
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        loss = (velocity - (noise - clean)).pow(2).mean()
        step_of(optimizer, loss, iteration, iterations)
        if iteration % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.to(torch.bfloat16), embedding.weight.detach().to(torch.bfloat16)


def resume(checkpoint: Path | None, parts: Mapping[str, Any]) -> int:
    """Loads what an interrupted training has kept, with the state of random numbers.

    Args:
        checkpoint: the file, if there is one.
        parts: modules and optimisers, by name.

    Returns:
        How many iterations are done.
    """
    if checkpoint is None or not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    return saved["iteration"]


def keep(checkpoint: Path | None, parts: Mapping[str, Any], done: int) -> None:
    """Writes the file for `resume` after every 100 iterations."""
    if checkpoint is not None and done % 100 == 0:
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "random": torch.get_rng_state(), "iteration": done}, checkpoint)


def step_of(optimizer: torch.optim.Optimizer, loss: torch.Tensor, iteration: int, iterations: int) -> None:
    """One step at a rate of 1e-3, with 100 iterations of warm-up and a cosine decay; gradients are clipped at 1."""
    rate = 1e-3 * min(1, iteration / 100) * (0.5 + 0.5 * math.cos(math.pi * iteration / iterations))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def train_predictors(demo: Demo, out: Path) -> None:
    """Records the demo's transformer in `out` and trains the demo's predictors on it."""
    pipe = demo.model.load_pipeline(out / demo.model.PIPELINE_DIR.name)
    inputs = inputs_of(demo, demo.training_samples, out)
    with tempfile.TemporaryDirectory() as scratch:
        steps = demo.num_inference_steps
        trajectories = lesa.record(pipe, inputs, Path(scratch) / "trajectories", steps, batch_size=16)
        for name, (mixer, schedule) in demo.predictors.items():
            if mixer == "newton" and isinstance(schedule, tuple):
                more = inputs_of(demo, END_TO_END_SAMPLES, out)
                predictor = newton_predictor(trajectories, pipe, inputs, more, schedule, demo.updates)
            else:
                config = PredictorConfig(trajectories.feature_dim, mixer=mixer)
                predictor = lesa.train(trajectories, config, schedule, epochs=60, tokens_per_batch=32)
            predictor.save_pretrained(out / name)


def round_predictors(demo: Demo, out: Path) -> None:
    """Rounds the demo's predictors in `out` to bfloat16: at half the size they forecast as well, within 0.01 dB."""
    for name in demo.predictors:
        FusedKANPredictor.from_pretrained(out / name).to(torch.bfloat16).save_pretrained(out / name)


def inputs_of(demo: Demo, count: int, out: Path) -> list[dict]:
    """The inputs of `count` samples, with the embeddings in `out`."""
    return demo.model.inputs_for(labels(count), out / demo.model.EMBEDDINGS_FILE.name)


def run_script(
    description: str | None,
    name: str,
    iterations: int,
    train: Callable[[int, Path | None], tuple[Any, torch.Tensor]],
    save: Callable[[Any, torch.Tensor, Path], None],
) -> None:
    """The command line of a script that makes a model of the demo and its predictors, rounded to bfloat16.

    Args:
        description: of the script.
        name: of the model.
        iterations: of its training, if the user does not choose others.
        train: makes transformer and embeddings from the number of iterations and the file of the unfinished training.
        save: writes transformer and embeddings into a folder.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS)
    parser.add_argument("--iterations", type=int, default=iterations, help="training iterations of the transformer")
    parser.add_argument("--checkpoint", type=Path, help="file to keep the training in and to go on from")
    parser.add_argument("--predictors-only", action="store_true", help="keep the transformer that is there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.predictors_only:
        save(*train(arguments.iterations, arguments.checkpoint), arguments.out)
    train_predictors(DEMOS[name], arguments.out)
    round_predictors(DEMOS[name], arguments.out)


def newton_predictor(
    trajectories: lesa.Trajectories,
    pipe: DiffusionPipeline,
    inputs: list[dict],
    more_inputs: list[dict],
    schedule: Sequence[int],
    updates: int,
) -> FusedKANPredictor:
    """A newton predictor that is trained, refined, and then trained end to end.

    Args:
        trajectories: the recording.
        pipe: the pipeline that was recorded.
        inputs: those of the recording.
        more_inputs: for the training end to end. Their seeds begin with `END_TO_END_SEED`.
        schedule: the computed steps.
        updates: of the training end to end.
    """
    trained = lesa.train(trajectories, schedule=schedule)
    refined = lesa.refine(trained, trajectories, pipe, inputs, rounds=2, samples_per_call=16)
    best = lesa.train_end_to_end(
        refined, pipe, more_inputs, updates=updates, learning_rate=1.5e-3, seed=END_TO_END_SEED
    )
    return with_typical_errors(best, trajectories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS)
    parser.add_argument("--iterations", type=int, default=1600, help="training iterations of the transformer")
    parser.add_argument("--predictors-only", action="store_true", help="keep the transformer that is there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.predictors_only:
        transformer, embeddings = train_transformer(arguments.iterations)
        digits.build_pipeline(transformer).save_pretrained(arguments.out / digits.PIPELINE_DIR.name)
        save_file({"class_embeddings": embeddings.contiguous()}, arguments.out / digits.EMBEDDINGS_FILE.name)
    train_predictors(DEMOS["digits"], arguments.out)


if __name__ == "__main__":
    main()
