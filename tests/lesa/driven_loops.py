"""Loops over the transformer of the digits pipeline that tests write out by hand, and predictors without training."""

import math

import torch

from lesa.demo import digits
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]
DIM = 128


def untrained_predictor(**options):
    """One as it is made: newton extrapolates along a line through the newest two anchors."""
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(DIM, **{"rank": 4, "hidden": 8, **options}))


def make_predictor(below=None, **options):
    """A newton predictor whose forecast depends on all its anchors; it gives NaN below a noise level."""
    predictor = untrained_predictor(**options)
    torch.nn.init.constant_(predictor.out_bias[:, 1:], 0.3)
    if below is not None:
        predictor.__class__, predictor.below = NanPredictor, below
    return predictor


class NanPredictor(FusedKANPredictor):
    def forward(self, ring, sigma):
        return super().forward(ring, sigma) * (math.nan if sigma < self.below else 1)


class BareScheduler:
    """A scheduler of somebody's own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def call_arguments(labels=(3, 8), tokens=64, seed=0):
    """Arguments of the transformer but for its timestep."""
    inputs, side = digits.inputs_for(labels), math.isqrt(tokens)
    grid = torch.meshgrid(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return {
        "hidden_states": torch.randn(len(labels), tokens, 4, generator=torch.Generator().manual_seed(seed)),
        "encoder_hidden_states": torch.cat([i["prompt_embeds"] for i in inputs]),
        "pooled_projections": torch.cat([i["pooled_prompt_embeds"] for i in inputs]),
        "img_ids": torch.stack(grid, -1).reshape(-1, 3),
        "txt_ids": torch.zeros(1, 3),
        "return_dict": False,
    }


@torch.no_grad()
def drive(pipe, calls_of_step, steps=STEPS):
    """A hand-written loop. `calls_of_step(step)` lists the calls as (name, arguments) or (name, arguments, context).

    The latents of every call move along a line, whatever the transformer says. Returns outputs[name][step].
    """
    scheduler, outputs = pipe.scheduler, {}
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps):
        for name, call, *context in calls_of_step(step):
            latents = call["hidden_states"] * (1 - 0.5 * step / steps)
            timestep = call.get("timestep", t / 1000).expand(len(latents))
            arguments = {**call, "hidden_states": latents, "timestep": timestep}
            if context:
                with pipe.transformer.cache_context(*context):
                    output = pipe.transformer(**arguments)[0]
            else:
                output = pipe.transformer(**arguments)[0]
            outputs.setdefault(name, {})[step] = output
        scheduler.step(output, t, latents)
    return outputs


def ours(caught):
    return [str(w.message) for w in caught if str(w.message).startswith("lesa: ")]


FIRST, SECOND, THIRD = (call_arguments(labels, seed=i) for i, labels in enumerate([(3, 8), (1, 6), (0, 7)]))
