"""Loops over the transformer of the digits pipeline that tests write by hand."""

import math

import torch

from lesa.demo import digits

STEPS = 12
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]


class BareScheduler:
    """A scheduler of somebody's own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def call_arguments(labels=(3, 8), tokens=64, seed=0, dtype=torch.float32):
    """Arguments of the transformer without its timestep."""
    inputs, side = digits.inputs_for(labels), math.isqrt(tokens)
    grid = torch.meshgrid(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return {
        "hidden_states": torch.randn(len(labels), tokens, 4, generator=torch.Generator().manual_seed(seed)).to(dtype),
        "encoder_hidden_states": torch.cat([i["prompt_embeds"] for i in inputs]).to(dtype),
        "pooled_projections": torch.cat([i["pooled_prompt_embeds"] for i in inputs]).to(dtype),
        "img_ids": torch.stack(grid, -1).reshape(-1, 3),
        "txt_ids": torch.zeros(1, 3),
        "return_dict": False,
    }


def guided(labels=(3, 8)):
    """Arguments of a digits pipeline that draws `labels`, for guidance by two calls per step."""
    negative = digits.inputs_for((0,) * len(labels))
    return {
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": torch.cat([i["prompt_embeds"] for i in negative]),
        "negative_pooled_prompt_embeds": torch.cat([i["pooled_prompt_embeds"] for i in negative]),
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
    """The texts of this package's own warnings."""
    return [str(w.message) for w in caught if str(w.message).startswith("lesa: ")]


FIRST, SECOND, THIRD = (call_arguments(labels, seed=i) for i, labels in enumerate([(3, 8), (1, 6), (0, 7)]))
