"""SkyReels-V2: `SkyReelsV2Transformer3DModel` and the pipelines built on it, with diffusion forcing."""

import torch

from lesa.models.wan import WanAdapter, WanCosts

_MOST_ADDED_NOISE = 60
"""Given frames have a timestep of 0, or of the noise that is added to them. Above this, the pipelines warn."""


class SkyReelsV2Costs(WanCosts):
    """What a SkyReels-V2 transformer costs; the usual model is the one with 14 billion parameters."""

    usual_config = WanCosts.usual_config | {"_class_name": "SkyReelsV2Transformer3DModel"}
    presets = {"skyreels-v2-540p": (544, 960, 97), "skyreels-v2-720p": (720, 1280, 121)}

    def call(self, image_tokens, text_tokens):
        frame_rate = {"fps": [1]} if self.config.get("inject_sample_info") else {}  # the number of one that it knows
        return super().call(image_tokens, text_tokens) | frame_rate


class SkyReelsV2Adapter(WanAdapter):
    """A SkyReels-V2 transformer.

    With diffusion forcing, each frame has a timestep. The frames that are given come first and have a small one. All
    others must have the same one, as in synchronous runs. In an asynchronous run (`ar_step` above 0) the frames are at
    different steps. Such a call has no place in the run and is computed. So is one with `addnoise_condition` above 60,
    whose given frames look like frames at another step.
    """

    family = "skyreels-v2"
    costs = SkyReelsV2Costs
    transformer_classes = ("SkyReelsV2Transformer3DModel",)
    untold = "it gets a timestep for each frame"

    def timestep(self, call):
        timestep = call.get("timestep")
        if not isinstance(timestep, torch.Tensor) or timestep.ndim == 1:
            return timestep
        last = timestep[:, -1:]
        is_one_step = ((timestep == last) | (timestep <= _MOST_ADDED_NOISE)).all(1)
        return torch.where(is_one_step, last[:, 0].float(), torch.nan)

    def conditioning(self, call, dtype, device=None):
        made = super().conditioning(call, dtype, device)
        if made.ndim == 2:
            return made
        _, rows, columns = self._token_grid(call)  # made for each frame
        return made.repeat_interleave(rows * columns, dim=1)
