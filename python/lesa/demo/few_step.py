"""The digits model for few steps: two students of `lesa.demo.digits`, one for 8 steps and one for 4.

A student is the digits transformer plus low-rank updates of its weights, as models for few steps are often published.
The files have the keys of diffusers, so `pipe.load_lora_weights` reads them too, where peft is installed. Here the
updates are added to the weights when the pipeline is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from lesa.demo import digits
from lesa.demo.digits import EMBEDDINGS_FILE, NUM_CLASSES, PIPELINE_DIR, WEIGHTS, inputs_for
from lesa_kernels.checks import check_choice

__all__ = ["EMBEDDINGS_FILE", "NUM_CLASSES", "PIPELINE_DIR", "WEIGHTS", "inputs_for", "load_pipeline"]

STUDENTS = (8, 4)
"""For how many steps there is a student."""
PREFIX, DOWN, UP = "transformer.", ".lora_A.weight", ".lora_B.weight"
"""Of the keys of a file: PREFIX, the name of a linear layer, then DOWN `[rank, in]` or UP `[out, rank]`."""


def file_of(steps: int, folder: Path = WEIGHTS) -> Path:
    """Where the updates of the student for so many steps are."""
    return folder / f"few-step-{steps}.safetensors"


def add_updates(transformer: FluxTransformer2DModel, updates: Mapping[str, torch.Tensor]) -> None:
    """Adds low-rank updates to the weights of a transformer: `weight += up @ down`, in float32.

    Args:
        transformer: its linear layers are changed.
        updates: tensors by the keys of a file.
    """
    for key, down in updates.items():
        if key.endswith(DOWN):
            name = key.removeprefix(PREFIX).removesuffix(DOWN)
            weight = transformer.get_submodule(name).get_parameter("weight")
            with torch.no_grad():
                weight += updates[PREFIX + name + UP].float() @ down.float()


def load_pipeline(folder: Path = PIPELINE_DIR, steps: int = 8) -> FluxPipeline:
    """The pipeline of a student in float32, with its progress bar off. Run it with `num_inference_steps=steps`.

    Args:
        folder: of the digits pipeline. The updates are beside it.
        steps: 8 or 4.

    Raises:
        ValueError: there is no student for so many steps.
    """
    check_choice("steps", steps, STUDENTS)
    pipe = digits.load_pipeline(folder)
    add_updates(pipe.transformer, load_file(file_of(steps, folder.parent)))
    return pipe
