"""Makes the bundled weights of the photographs: `python -m lesa.demo.make_photos`.

Flow matching on details of the photographs that ship inside scikit-image and scikit-learn, then the predictors. Seeded.
It took about 30 minutes on 2 cores that others used as well, before there was training through whole runs. How long it
takes with it was not measured. One thread (`OMP_NUM_THREADS=1`) is fastest where cores are shared.
"""

from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lesa.demo import photos
from lesa.demo.make_weights import keep, resume, run_script, step_of

HEIGHTS = (64, 96, 144, 216)
"""Of the photographs that the details are cut from."""
NO_LABEL = 0.12
"""The part of the samples that are trained as the negative prompt."""

_SOURCES = {
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "astronaut": skimage.data.astronaut,
    "camera": skimage.data.camera,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "galaxies": skimage.data.hubble_deep_field,
    "retina": skimage.data.retina,
    "rocket": skimage.data.rocket,
    "tissue": skimage.data.immunohistochemistry,
}


def pyramid(name: str) -> list[torch.Tensor]:
    """The photograph at all `HEIGHTS`, each `[3, height, width]` in [-1, 1]."""
    pixels = torch.tensor(_SOURCES[name](), dtype=torch.float32) / 127.5 - 1
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
    sizes = [(height, round(height * pixels.shape[2] / pixels.shape[1])) for height in HEIGHTS]
    return [F.interpolate(pixels[None], size=size, mode="area")[0] for size in sizes]


def details(pyramids: list[list[torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
    """A random detail of each labelled photograph, at a random height, half of them mirrored: `[N, 3, SIDE, SIDE]`."""
    cut = []
    for label in labels.tolist():
        photo = pyramids[label][torch.randint(len(HEIGHTS), ())]
        top, left = (int(torch.randint(size - photos.SIDE + 1, ())) for size in photo.shape[1:])
        cut.append(photo[:, top : top + photos.SIDE, left : left + photos.SIDE])
    images = torch.stack(cut)
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def packed(images: torch.Tensor) -> torch.Tensor:
    """The images `[N, 3, SIDE, SIDE]` as tokens `[N, 64, 48]`: the autoencoder's 2x2 squares, then the pipeline's."""
    half, quarter = photos.SIDE // 2, photos.SIDE // 4
    latents = images.reshape(-1, 3, half, 2, half, 2).permute(0, 1, 5, 3, 2, 4).reshape(-1, 12, half, half)
    return latents.reshape(-1, 12, quarter, 2, quarter, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, quarter**2, 48)


def train_transformer(
    iterations: int, checkpoint: Path | None = None, seed: int = 0
) -> tuple[QwenImageTransformer2DModel, torch.Tensor]:
    """Trains the transformer and the embeddings; returns both in bfloat16.

    Args:
        iterations: batches of 64.
        checkpoint: file that is written every 100 iterations, and read first if it is there.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**photos.TRANSFORMER_CONFIG)
    embedding = nn.Embedding(photos.NUM_CLASSES + 1, photos.EMBEDDING_DIM)
    optimizer = torch.optim.AdamW([*model.parameters(), *embedding.parameters()], lr=1e-3, weight_decay=1e-4)
    parts = {"model": model, "embedding": embedding, "optimizer": optimizer}
    first = resume(checkpoint, parts)
    pyramids = [pyramid(name) for name in photos.NAMES]
    batch, quarter, average = 64, photos.SIDE // 4, 0.0
    progress = tqdm(range(first, iterations), desc="transformer", initial=first, total=iterations, mininterval=10)
    for iteration in progress:
        labels = torch.randint(photos.NUM_CLASSES, (batch,))
        clean = packed(details(pyramids, labels))
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch))
        labels[torch.rand(batch) < NO_LABEL] = photos.NOTHING
        # For so few tokens these two are faster on a CPU than float32 and flash attention, by 1.6 together.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(
                hidden_states=(1 - sigma)[:, None, None] * clean + sigma[:, None, None] * noise,
                encoder_hidden_states=embedding(labels)[:, None],
                timestep=sigma,
                img_shapes=[[(1, quarter, quarter)]] * batch,
                return_dict=False,
            )[0]
        loss = (velocity - (noise - clean)).pow(2).mean()
        step_of(optimizer, loss, iteration, iterations)
        average += (loss.item() - average) / min(100, iteration - first + 1)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        keep(checkpoint, parts, iteration + 1)
    return model.to(torch.bfloat16), embedding.weight.detach().to(torch.bfloat16)


def save(transformer: QwenImageTransformer2DModel, embeddings: torch.Tensor, out: Path) -> None:
    """Writes the pipeline in bfloat16, and the embeddings."""
    pipe = photos.build_pipeline(transformer)
    pipe.vae.to(torch.bfloat16)  # its weights stay what they are
    pipe.save_pretrained(out / photos.PIPELINE_DIR.name)
    save_file({"class_embeddings": embeddings.contiguous()}, out / photos.EMBEDDINGS_FILE.name)


if __name__ == "__main__":
    run_script(__doc__, "photos", 3000, train_transformer, save)
