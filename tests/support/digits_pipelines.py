"""Pipelines of the digits model's shapes."""

from functools import cache

import torch
from diffusers import FluxTransformer2DModel

from lesa.demo import digits


@cache
def _weights() -> dict[str, torch.Tensor]:
    return digits.load_pipeline().transformer.state_dict()


def cut_pipeline():
    """The digits pipeline with half of its blocks: one that is as good for most tests, and twice as fast."""
    with torch.device("meta"):  # its own weights would be thrown away
        transformer = FluxTransformer2DModel(**digits.TRANSFORMER_CONFIG | {"num_layers": 1, "num_single_layers": 2})
    weights = {name: _weights()[name].clone() for name in transformer.state_dict()}
    transformer.load_state_dict(weights, assign=True)
    pipe = digits.build_pipeline(transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe
