"""What a predictor's repository on the Hugging Face hub holds beside its own files: a model card, and its pictures."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lesa_kernels.predictor.config import PredictorConfig
from lesa_kernels.predictor.files import CONFIG_NAME, PROVENANCE_NAME, WEIGHTS_NAME

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_NAME = "README.md"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")


def front_matter(tags: Sequence[str] = (), base_model: str | None = None) -> str:
    """The head of a model card, in YAML. The licence is left to the user.

    Args:
        tags: beside those of every card.
        base_model: the hub id of the model that the predictor is for.
    """
    every = dict.fromkeys(["lesa-kernels", "diffusers", *tags])
    model = [] if base_model is None else [f"base_model: {base_model}"]
    return "\n".join(["---", "library_name: lesa-kernels", *model, "tags:", *(f"- {tag}" for tag in every), "---"])


_MARK = re.compile("<!-- lesa-kernels wrote this card for the predictor [0-9a-f]{64}")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^()/\\\s*?\[\]]+)\)")  # no patterns


def mark_of(folder: Path) -> str:
    """The line of a generated card that says for which predictor it is. A card without this line is the user's own.

    Args:
        folder: of the saved predictor. Its weights and its schedule count.
    """
    return (
        f"<!-- lesa-kernels wrote this card for the predictor {_digest_of(folder)}. "
        "Remove this line if you write a text of your own. -->"
    )


def _digest_of(folder: Path) -> str:
    """SHA-256 of the weights of a saved predictor and of the steps that it computes."""
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    running = hashlib.sha256(json.dumps([config.get("num_inference_steps"), config.get("schedule")]).encode())
    for name, value in sorted(load_file(folder / WEIGHTS_NAME).items()):
        running.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        running.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def minimal_card(config: PredictorConfig, mark: str) -> str:
    """The card of a predictor that has none.

    Args:
        config: of the predictor.
        mark: from `mark_of`.
    """
    tags = [config.family] if config.family else []
    about = "This is a predictor for one diffusion transformer. It works with the Python package lesa-kernels."
    if config.schedule is not None:
        steps = ", ".join(map(str, config.schedule))
        about += f" It was trained for runs of {config.num_inference_steps} steps of which these are computed: {steps}."
    use = '```python\nimport lesa\nlesa.enable_cache(pipe, "user/name")\n```'
    use += "\n\nReplace the name by that of this repository."
    return "\n\n".join([front_matter(tags), mark, "# A predictor of lesa-kernels", about, use]) + "\n"


def add_card(api: "HfApi", repo_id: str, config: PredictorConfig, source: Path | None, folder: Path) -> list[str]:
    """Puts a card into the folder that is uploaded: the one of the predictor, else a minimal one.

    A generated card counts only if it is for the weights that are uploaded. A card that the user wrote always counts. A
    minimal card does not replace a card of the repository that counts.

    Args:
        api: of the hub.
        repo_id: the repository.
        config: of the predictor.
        source: the folder from which the predictor was loaded; None if there is none.
        folder: what is uploaded. It has the predictor already.

    Returns:
        Which files of the repository are to be deleted, because they are of other weights.
    """
    outdated = [] if (folder / PROVENANCE_NAME).exists() else [PROVENANCE_NAME]
    mark = mark_of(folder)
    if source is not None and _copy_card(source, folder, mark):
        return outdated
    if api.file_exists(repo_id, CARD_NAME):
        text = Path(api.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
        if _counts(text, mark):
            return outdated
        outdated += [name for name in _PICTURE.findall(text) if Path(name).suffix.lower() in PICTURE_SUFFIXES]
    (folder / CARD_NAME).write_text(minimal_card(config, mark), encoding="utf-8")
    return outdated


def _counts(card: str, mark: str) -> bool:
    """Whether a card is the user's own, or was made for the predictor of this mark."""
    return _MARK.search(card) is None or mark in card


def _copy_card(source: Path, folder: Path, mark: str) -> bool:
    """Copies a card that counts, and the pictures beside it that its text names; returns whether there is one."""
    card = source / CARD_NAME
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    if not _counts(text, mark):
        return False
    shutil.copyfile(card, folder / CARD_NAME)
    for file in source.iterdir():
        if file.suffix.lower() in PICTURE_SUFFIXES and file.name in text and file.is_file():
            shutil.copyfile(file, folder / file.name)
    return True
