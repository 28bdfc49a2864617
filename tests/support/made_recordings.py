"""Recordings that no model has made: the features of each token move along a curve."""

import json

import torch
from safetensors.torch import save_file

import lesa

STEPS, TOKENS, WIDTH, OUT = 12, 5, 6, 3


def write_recording(folder, samples=6, streams=1, shifts=(1.0,), bias=True, tokens=TOKENS, seed=0):
    """A recording in which every sample, stream, token and step has a head modulation and a curve of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    folder.mkdir()
    head = {"weight": normal(OUT, WIDTH), "bias": normal(OUT)}
    save_file(head if bias else {"weight": head["weight"]}, folder / "head.safetensors")
    for number in range(samples):
        shift = shifts[number % len(shifts)]
        sigmas = torch.linspace(1, 1 / STEPS, STEPS)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        powers = torch.stack([sigmas**p for p in range(4)])
        for stream in range(streams):
            curve = torch.einsum("ps,ptd->std", powers, normal(4, tokens, WIDTH))
            tensors = {
                "features": curve + 0.05 * normal(STEPS, tokens, WIDTH),
                "latents": normal(STEPS, tokens, OUT),
                "sigmas": sigmas,
                "scale": 0.3 * normal(STEPS, WIDTH),
                "shift": 0.3 * normal(STEPS, WIDTH),
                "token_index": torch.arange(tokens),
            }
            save_file(tensors, folder / f"sample-{number:05d}{'-uncond' if stream else ''}.safetensors")
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
