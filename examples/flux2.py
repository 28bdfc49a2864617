"""A picture by FLUX.2: `python examples/flux2.py`."""

import sys

import torch
from diffusers import Flux2Pipeline

import lesa

MODEL, PROMPT = "black-forest-labs/FLUX.2-dev", "a red fox in the snow"


def main(output: str = "fox.png", model: str = MODEL, prompt: str = PROMPT, **options) -> None:
    """Draws a picture with 12 of 50 steps computed. `options` go to the pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = Flux2Pipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    options = {"num_inference_steps": 50, "guidance_scale": 4.0, **options}
    with lesa.enable_cache(pipe) as cache:
        image = pipe(prompt, generator=torch.manual_seed(0), **options).images[0]
    image.save(output)
    print(cache.stats.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
