"""How close samples are to those of the full run, and how certain that is."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from skimage.metrics import structural_similarity

CLIP_MODELS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32")
"""The first of these that is on the machine gives the CLIP score."""

IMAGE_REWARD = "THUDM/ImageReward"

LEARNED = ("lpips", "clip_score", "image_reward")
"""Qualities that need weights, which are never downloaded."""

RESAMPLES = 10_000
MOST_OF_A_FRAME = 100.0  # dB: a root mean square error of 1e-5, far below what 8 bits hold
LARGEST_DRAW = 1 << 20  # of indices, so that resampling takes little memory however many samples there are
SMALLEST_IMAGE = 64  # pixels; the networks of LPIPS and CLIP can't judge smaller ones

Measure = Callable[[np.ndarray, np.ndarray, str | None], float]
"""A quality of an image, given the reference's image and the prompt."""


def psnr(values: np.ndarray, wanted: np.ndarray, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite if both are equal."""
    error = float(np.mean(np.square(values - wanted, dtype=np.float64)))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def frame_psnr(video: np.ndarray, wanted: np.ndarray) -> float:
    """The mean of the frames' PSNRs in dB.

    It is never below the PSNR of the whole video, for which the errors of all frames are averaged first, unless that
    is above the limit. It is much higher where most of the error is in a few frames.

    Args:
        video, wanted: `[frames, height, width, 3]` in [0, 1].

    Returns:
        Infinite if the videos are equal. Else a frame counts at most `MOST_OF_A_FRAME`, so that one that is equal, such
        as a frame that was given, does not make the mean infinite.
    """
    values = [psnr(*frames, peak=1.0) for frames in zip(video, wanted)]
    return math.inf if min(values) == math.inf else float(np.mean(np.minimum(values, MOST_OF_A_FRAME)))


def temporal_psnr(video: np.ndarray, wanted: np.ndarray) -> float:
    """The PSNR in dB of the differences between neighbouring frames, against those of the reference, for a peak of 2.

    Differences of values in [0, 1] lie in [-1, 1], a range of 2. An error that stays the same from frame to frame does
    not count. An error of one size that changes its sign in each frame, a flicker, gives the PSNR of the whole video.
    With F frames, the figure is never more than `10 log10(F / (F - 1))` below it.

    Args:
        video, wanted: `[frames, height, width, 3]` in [0, 1].

    Returns:
        Infinite if all differences are equal. NaN for a single frame.
    """
    if len(video) < 2:
        return math.nan
    ours, theirs = (np.diff(frames.astype(np.float64), axis=0) for frames in (video, wanted))
    return psnr(ours, theirs, peak=2.0)


def ssim(image: np.ndarray, wanted: np.ndarray) -> float:
    """Structural similarity of images `[H, W, 3]` in [0, 1], or the mean over the frames of a video."""
    if image.ndim == 4:
        return float(np.mean([ssim(*frames) for frames in zip(image, wanted)]))
    side = min(7, *image.shape[:2])  # the usual window is 7 pixels wide; it must be odd and fit
    window = side - (side % 2 == 0)
    return float(structural_similarity(image, wanted, win_size=window, channel_axis=-1, data_range=1.0))


def relative_error(values: np.ndarray, wanted: np.ndarray) -> float:
    """The L2 norm of the difference over that of `wanted`."""
    values, wanted = (array.astype(np.float64).ravel() for array in (values, wanted))
    return float(np.linalg.norm(values - wanted) / np.linalg.norm(wanted)) if wanted.any() else math.nan


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean.

    Args:
        differences: one per sample. One that is infinite or NaN makes both ends NaN.
        seed: of the 10 000 resamples.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        return math.nan, math.nan
    generator, size = np.random.default_rng(seed), len(values)
    at_once = max(1, LARGEST_DRAW // size)
    means = [
        values[generator.integers(size, size=(min(at_once, RESAMPLES - begin), size))].mean(axis=1)
        for begin in range(0, RESAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; none if it is rounded to 0."""
    text = f"{value:+.{digits}f}"
    return text if text.strip("+-0.") else text[1:]


def paired_lead(ours: Sequence[float | None], others: Sequence[float | None]) -> tuple[float, float, float]:
    """The mean of the paired differences, ours less the others, and the ends of its 95 % interval.

    Args:
        ours, others: a figure of each sample, in the same order. None is an unknown one. If any is unknown, NaN or
            infinite, the ends of the interval are NaN.
    """
    pairs = np.array([ours, others], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        differences = pairs[0] - pairs[1]
    return float(differences.mean()) if len(differences) else math.nan, *bootstrap_interval(differences)


def learned_qualities(
    device: torch.device, prompts: Sequence[str | None], size: Sequence[int]
) -> tuple[dict[str, Measure], dict[str, str]]:
    """The qualities in `LEARNED` whose networks are on this machine.

    Args:
        device: where to put the networks.
        prompts: of the inputs; None for one that has no text.
        size: shape of an image, `[H, W, 3]`; of a video, `[frames, H, W, 3]`.

    Returns:
        Functions of an image, the reference's image and the prompt, by name; and the reasons for the other names.
    """
    found: dict[str, Measure] = {}
    reasons: dict[str, str] = {}
    result: Measure | str
    for name, load in zip(LEARNED, (_lpips, _clip_score, _image_reward)):
        if len(size) != 3:
            result = "it is for images, and these are videos"
        elif min(size[:2]) < SMALLEST_IMAGE:
            result = f"images of {size[0]} x {size[1]} pixels are too small for it; it needs {SMALLEST_IMAGE}"
        elif name != "lpips" and not all(prompts):
            result = "the inputs have no text"
        else:
            try:
                result = load(device)
            except (OSError, ImportError, RuntimeError) as error:  # files that are broken, or do not fit each other
                result = f"it could not be loaded: {' '.join(str(error).split())[:200]}"
        if isinstance(result, str):
            reasons[name] = result
        else:
            found[name] = result
    return found, reasons


def _lpips(device: torch.device) -> Measure | str:
    try:
        from lpips import LPIPS
    except ImportError:
        return "the package lpips is not installed"
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(checkpoints.glob("alexnet-*.pth")):
        return f"there are no weights of AlexNet in {checkpoints}"
    network = LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(image: np.ndarray, wanted: np.ndarray, prompt: str | None) -> float:
        tensors = (torch.from_numpy(i).permute(2, 0, 1)[None].float().to(device) * 2 - 1 for i in (image, wanted))
        return network(*tensors).item()

    return distance


def _clip_score(device: torch.device) -> Measure | str:
    name = next((m for m in CLIP_MODELS if isinstance(try_to_load_from_cache(m, "config.json"), str)), None)
    if name is None:
        return f"none of {', '.join(CLIP_MODELS)} is in the hub's cache"
    from transformers import CLIPModel, CLIPProcessor

    network = CLIPModel.from_pretrained(name, local_files_only=True).to(device).eval()
    processor = CLIPProcessor.from_pretrained(name, local_files_only=True)

    @torch.no_grad()
    def score(image: np.ndarray, wanted: np.ndarray, prompt: str | None) -> float:
        pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
        inputs = processor(text=[prompt], images=[pixels], return_tensors="pt", truncation=True, padding=True)
        output = network(**inputs.to(device))
        return max(0.0, 100 * torch.cosine_similarity(output.image_embeds, output.text_embeds).item())

    return score


def _image_reward(device: torch.device) -> Measure | str:
    try:
        import ImageReward
    except ImportError:
        return "the package image-reward is not installed"
    wanted = ((IMAGE_REWARD, "ImageReward.pt"), (IMAGE_REWARD, "med_config.json"), ("bert-base-uncased", "vocab.txt"))
    files = [try_to_load_from_cache(*file) for file in wanted]
    for (repository, name), file in zip(wanted, files):
        if not isinstance(file, str):
            return f"{name} of {repository} is not in the hub's cache"
    network = ImageReward.load(files[0], device=str(device), med_config=files[1])

    def reward(image: np.ndarray, wanted: np.ndarray, prompt: str | None) -> float:
        from PIL import Image

        return float(network.score(prompt, Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))))

    return reward
