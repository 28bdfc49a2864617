"""What a predictor's repository on the Hugging Face hub holds beside its own files: a model card, and its pictures."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lesa_kernels.predictor.config import PredictorConfig

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


def minimal_card(config: PredictorConfig) -> str:
    """The card of a predictor that has none."""
    tags = [config.family] if config.family else []
    about = "This is a predictor for one diffusion transformer. It works with the Python package lesa-kernels."
    if config.schedule is not None:
        steps = ", ".join(map(str, config.schedule))
        about += f" It was trained for runs of {config.num_inference_steps} steps of which these are computed: {steps}."
    use = '```python\nimport lesa\nlesa.enable_cache(pipe, "user/name")\n```'
    use += "\n\nReplace the name by that of this repository."
    return "\n\n".join([front_matter(tags), "# A predictor of lesa-kernels", about, use]) + "\n"


def copy_card(source: Path, folder: Path) -> bool:
    """Copies a model card, and the pictures beside it that its text names.

    Args:
        source: the folder in which the card lies.
        folder: where to copy it.

    Returns:
        Whether there is a card.
    """
    card = source / CARD_NAME
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8")
    shutil.copyfile(card, folder / CARD_NAME)
    for file in source.iterdir():
        if file.suffix.lower() in PICTURE_SUFFIXES and file.name in text and file.is_file():
            shutil.copyfile(file, folder / file.name)
    return True


def add_card(api: "HfApi", repo_id: str, config: PredictorConfig, source: Path | None, folder: Path) -> None:
    """Puts a card into the folder that is uploaded: the one of the predictor, else a minimal one.

    A minimal card does not replace a card that the repository has.

    Args:
        api: of the hub.
        repo_id: the repository.
        config: of the predictor.
        source: the folder from which the predictor was loaded; None if there is none.
        folder: what is uploaded.
    """
    if source is not None and copy_card(source, folder):
        return
    if not api.file_exists(repo_id, CARD_NAME):
        (folder / CARD_NAME).write_text(minimal_card(config), encoding="utf-8")
