"""A video by HunyuanVideo: `python examples/hunyuan_video.py`."""

import sys

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

import lesa

MODEL, PROMPT = "hunyuanvideo-community/HunyuanVideo", "a cat walks on the grass"


def main(output: str = "cat.mp4", model: str = MODEL, prompt: str = PROMPT, **options) -> None:
    """Makes a video of four seconds. `options` go to the pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = HunyuanVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    pipe.vae.enable_tiling()
    options = {"num_inference_steps": 50, "height": 480, "width": 640, "num_frames": 65, **options}
    with lesa.enable_cache(pipe, max_device_bytes=300_000_000) as cache:
        video = pipe(prompt, generator=torch.manual_seed(0), **options).frames[0]
    export_to_video(video, output, fps=15)
    print(cache.stats.summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
