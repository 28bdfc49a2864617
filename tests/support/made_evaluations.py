"""Evaluations that nobody ran, in the form that `lesa evaluate` writes: for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

STEPS = 50
PEERS = {  # contender: name of a run, how far its PSNR is below newton's, seconds of a step
    "newton": ("newton-{:g}", 0.0, 0.17),
    "dense": ("dense-{:g}", 8.5, 0.20),
    "steps": ("fewer-steps-{:g}", 12.0, 0.13),
    "taylorseer": ("taylorseer-lite-order1-interval{:g}", 6.0, 0.18),
    "first-block-cache": ("first-block-cache-{:g}", 9.5, 0.19),
    "mag-cache": ("mag-cache-{:g}", 10.5, 0.16),
    "cache-dit": ("cache-dit-{:g}", 4.7, 0.22),
}


def make_evaluation(folder: Path, samples: int = 3, side: int = 16, budgets=(10, 9, 8, 7, 5), rename=None) -> dict:
    """Writes an evaluation of made-up figures into `folder`; returns its summary.

    Args:
        folder: where to.
        samples, side: pictures of each run, and their width and height.
        budgets: numbers of step equivalents.
        rename: the names of contenders that are called otherwise, in their runs' names too.
    """
    random = np.random.default_rng(0)
    sigmas = np.linspace(1, 1 / STEPS, STEPS)
    wave = np.linspace(0, np.pi, side)
    full = [
        np.stack([np.outer(np.sin(wave * (1 + i)), np.sin(wave * (k + 1))) / 2 + 0.5 for k in range(3)], -1)
        for i in range(samples)
    ]

    def save(name: str, error: float) -> list[str]:
        files = []
        for number, image in enumerate(full):
            file = folder / "images" / name.replace("/", "-").replace("<", "-") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noisy = np.clip(image + error * random.standard_normal(image.shape), 0, 1)
            Image.fromarray((noisy * 255).round().astype(np.uint8)).save(file)
            files.append(str(file.relative_to(folder)))
        return files

    def run(name, contender, count, psnr, seconds, is_best=True, setting=""):
        steps = sorted({0, *np.linspace(2, STEPS - 3, max(1, round(count) - 1)).round().astype(int).tolist()})
        computed = np.isin(np.arange(STEPS), steps)
        growth = np.cumsum(np.where(computed, 0.1, 1.0)) + 0.2
        errors = (10 ** (-(psnr or 60) / 20) * growth / growth[-1]).tolist()
        same_steps = contender != "steps"
        latent_error = None if psnr is None else 10 ** (-psnr / 20)
        return {
            "name": name,
            "contender": contender,
            "setting": setting,
            "is_best": is_best,
            "steps": steps if same_steps else list(range(round(count))),
            "num_inference_steps": STEPS if same_steps else round(count),
            "whole_steps": float(len(steps)),
            "step_equivalents": float(count),
            "seconds": seconds,
            "denoise_seconds": 0.95 * seconds,
            "speedup": 7.9 / seconds,
            "peak_memory_bytes": None,
            "psnr": psnr,
            "ssim": 1.0 if psnr is None else 1 - 10 ** (-psnr / 13),
            "latent_error": latent_error,
            "latent_psnr": psnr,
            "lpips": None,
            "clip_score": None,
            "image_reward": None,
            "per_sample": {"psnr": [psnr and psnr + 0.3 * i for i in range(samples)]},
            "step_errors": errors if same_steps and psnr is not None else [None] * STEPS,
            "against_ours": None,
        }

    runs = [{**run("reference", "reference", STEPS, None, 7.9), "steps": list(range(STEPS))}]
    images = {"reference": save("reference", 0.0)}
    for contender, (pattern, below, pace) in PEERS.items():
        called = (rename or {}).get(contender, contender)
        for budget in budgets:
            count = budget + {"taylorseer": 1, "cache-dit": 0.7, "first-block-cache": 0.3}.get(contender, 0)
            psnr = 34 + 1.7 * budget - below - 0.04 * budget * below / 6
            name = pattern.format(count).replace(contender, called)
            runs.append(run(name, called, count, psnr, 0.15 + pace * count, setting=f"the {budget}th way"))
            images[name] = save(name, 10 ** (-psnr / 20))
            if contender != "newton":
                low, value, high = psnr * 0, 34 + 1.7 * budget - psnr, below + 1.5
                ours = f"newton-{budget:g}".replace("newton", (rename or {}).get("newton", "newton"))
                runs[-1]["against_ours"] = {"ours": ours, "psnr_difference": value, "low": low, "high": high}
            if contender not in ("newton", "dense", "steps"):
                for number in (1, 2):
                    worse = run(
                        f"{name}-{number}", called, count + 0.2 * number, psnr - 2 * number, 0.2 + pace * count, False
                    )
                    runs.append(worse)
    summary = {
        "format_version": 1,
        "model": "FluxPipeline, FluxTransformer2DModel, 2.3 M parameters",
        "samples": samples,
        "seed": 10000,
        "batch_size": samples,
        "dtype": "float32",
        "device": "x86_64",
        "threads": 2,
        "versions": {"lesa_kernels": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.1", "python": "3.11.2"},
        "num_inference_steps": STEPS,
        "sigmas": sigmas.tolist(),
        "stage_bounds": [0.67, 0.33],
        "not_available": {"lpips": "its weights are not on this machine"},
        "runs": runs,
        "images": images,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary
