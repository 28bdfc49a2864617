"""Makes the bundled weights of the videos: `python -m lesa.demo.make_video`.

Flow matching on videos of scikit-learn's handwritten digits that move and bounce, then the predictors. Seeded.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lesa.demo import video
from lesa.demo.make_weights import keep, resume, run_script, step_of

DIGIT = 10
"""Height and width of a digit in a frame, in pixels."""
SPEEDS = (0.5, 1.25)
"""The slowest and the fastest digit, in pixels per frame."""


def moving_digits(images: torch.Tensor) -> torch.Tensor:
    """Videos of the images, each of which begins anywhere, moves in any direction, and bounces off the edges.

    Args:
        images: `[N, 8, 8]` in [0, 1].

    Returns:
        `[N, FRAMES, SIDE, SIDE]` in [-1, 1].
    """
    count, room = len(images), video.SIDE - DIGIT
    angle = torch.rand(count) * 2 * torch.pi
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * torch.rand(count)
    velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    way = torch.rand(count, 1, 2) * room + torch.arange(video.FRAMES)[None, :, None] * velocity[:, None]
    corner = room - (way.remainder(2 * room) - room).abs()  # of the digit, [N, FRAMES, 2], from 0 to room
    move = torch.zeros(count, video.FRAMES, 2, 3)
    move[..., 0, 0] = move[..., 1, 1] = video.SIDE / DIGIT
    move[..., 2] = (room - 2 * corner) / DIGIT
    grid = F.affine_grid(move.flatten(0, 1), [count * video.FRAMES, 1, video.SIDE, video.SIDE], align_corners=False)
    frames = images.repeat_interleave(video.FRAMES, 0)[:, None]
    drawn = F.grid_sample(frames, grid, mode="bilinear", align_corners=False)
    return drawn.view(count, video.FRAMES, video.SIDE, video.SIDE) * 2 - 1


def latents_of(videos: torch.Tensor) -> torch.Tensor:
    """The videos `[N, FRAMES, SIDE, SIDE]` as the autoencoder's latents `[N, 16, FRAMES, 4, 4]`."""
    side = video.SIDE // video.PATCH
    squares = videos.view(-1, video.FRAMES, side, video.PATCH, side, video.PATCH)
    return squares.permute(0, 5, 3, 1, 2, 4).reshape(-1, video.PATCH**2, video.FRAMES, side, side)


def train_transformer(
    iterations: int, checkpoint: Path | None = None, seed: int = 0
) -> tuple[HunyuanVideoTransformer3DModel, torch.Tensor]:
    """Trains the transformer and the class embeddings; returns both in bfloat16.

    Args:
        iterations: batches of 16 videos.
        checkpoint: file that is written every 100 iterations, and read first if it is there.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**video.TRANSFORMER_CONFIG)
    embedding = nn.Embedding(video.NUM_CLASSES, video.EMBEDDING_DIM)
    optimizer = torch.optim.AdamW([*model.parameters(), *embedding.parameters()], lr=1e-3, weight_decay=1e-4)
    parts = {"model": model, "embedding": embedding, "optimizer": optimizer}
    first = resume(checkpoint, parts)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    batch, average = 16, 0.0
    progress = tqdm(range(first, iterations), desc="transformer", initial=first, total=iterations, mininterval=10)
    for iteration in progress:
        index = torch.randint(0, len(images), (batch,))
        clean = latents_of(moving_digits(images[index]))
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch))
        sigma = 3 * sigma / (1 + 2 * sigma)  # more of the high levels, where a video begins
        conditioning = embedding(labels[index])
        level = sigma[:, None, None, None, None]
        # For so few tokens these two are faster on a CPU than float32 and flash attention.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(
                hidden_states=(1 - level) * clean + level * noise,
                timestep=sigma * 1000,
                encoder_hidden_states=conditioning[:, None],
                encoder_attention_mask=torch.ones(batch, 1),
                pooled_projections=conditioning,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - clean)).pow(2).mean()
        step_of(optimizer, loss, iteration, iterations)
        average += (loss.item() - average) / min(100, iteration - first + 1)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        keep(checkpoint, parts, iteration + 1)
    return model.to(torch.bfloat16), embedding.weight.detach().to(torch.bfloat16)


def save(transformer: HunyuanVideoTransformer3DModel, embeddings: torch.Tensor, out: Path) -> None:
    """Writes the pipeline in bfloat16, and the embeddings."""
    pipe = video.build_pipeline(transformer)
    pipe.save_pretrained(out / video.PIPELINE_DIR.name)
    save_file({"class_embeddings": embeddings.contiguous()}, out / video.EMBEDDINGS_FILE.name)


if __name__ == "__main__":
    run_script(__doc__, "video", 2800, train_transformer, save)
