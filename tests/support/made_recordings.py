"""Recordings that no model has made: the features of each token move along a curve."""

import json

import torch
from safetensors.torch import save_file

import lesa

STEPS, TOKENS, WIDTH, OUT = 12, 5, 6, 3


def write_recording(folder, samples=6, tokens=TOKENS, seed=0):
    """A recording of the family "flux" with latents, of one stream of calls."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    folder.mkdir()
    save_file({"weight": normal(OUT, WIDTH), "bias": normal(OUT)}, folder / "head.safetensors")
    sigmas = torch.linspace(1, 1 / STEPS, STEPS)
    powers = torch.stack([sigmas**power for power in range(4)])
    for number in range(samples):
        curve = torch.einsum("ps,ptd->std", powers, normal(4, tokens, WIDTH))
        tensors = {
            "features": curve + 0.05 * normal(STEPS, tokens, WIDTH),
            "latents": normal(STEPS, tokens, OUT),
            "sigmas": sigmas,
            "scale": 0.3 * normal(STEPS, WIDTH),
            "shift": 0.3 * normal(STEPS, WIDTH),
            "token_index": torch.arange(tokens),
        }
        save_file(tensors, folder / f"sample-{number:05d}.safetensors")
    manifest = {
        "format_version": 1,
        "family": "flux",
        "feature_dim": WIDTH,
        "num_inference_steps": STEPS,
        "samples": samples,
        "seed": seed,
        "head_eps": 1e-3,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return lesa.Trajectories(folder)
