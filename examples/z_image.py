"""A picture by Z-Image: `python examples/z_image.py`."""

import sys

import torch
from diffusers import ZImagePipeline

import lesa

MODEL, PROMPT = "Tongyi-MAI/Z-Image", "a red fox in the snow"


def main(output: str = "fox.png", model: str = MODEL, prompt: str = PROMPT, **options) -> None:
    """Draws a picture with 12 of 50 steps computed. `options` go to the pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = ZImagePipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    options = {"num_inference_steps": 50, "guidance_scale": 4.0, **options}
    with lesa.enable_cache(pipe) as cache:
        image = pipe(prompt, generator=torch.manual_seed(0), **options).images[0]
    image.save(output)
    print(cache.stats.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
