"""A video by Wan 2.2, whose two transformers share a cache: `python examples/wan2_2.py`."""

import sys

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import lesa

MODEL, PROMPT = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "a cat walks on the grass"


def main(output: str = "cat.mp4", model: str = MODEL, prompt: str = PROMPT, **options) -> None:
    """Makes a video; each transformer computes its own first step. `options` go to the pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    options = {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0, **options}
    with lesa.enable_cache(pipe) as cache:
        video = pipe(prompt, generator=torch.manual_seed(0), **options).frames[0]
    export_to_video(video, output, fps=16)
    print(cache.stats.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
