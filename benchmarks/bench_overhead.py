"""What a predicted step takes the host: hook, state, forecast and head, on a transformer that is deep and narrow."""

import pytest
import torch
from floors import synchronise

pytest.importorskip("diffusers")
from diffusers import FluxTransformer2DModel  # noqa: E402

import lesa  # noqa: E402
from lesa.demo.digits import build_pipeline  # noqa: E402
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS, COMPUTED = 50, (0, 2, 6, 12, 18, 25, 32, 39, 46)
DEPTHS = {"6-blocks": (2, 4), "57-blocks": (19, 38)}  # double and single blocks; FLUX.1 has 57
WIDTH = 32  # narrow, so that there is next to no arithmetic


class Loop:
    """The loop of a pipeline, run after run."""

    def __init__(self, depth, device):
        torch.manual_seed(0)
        config = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "in_channels": 4}
        config |= {"joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True}
        config |= dict(zip(("num_layers", "num_single_layers"), DEPTHS[depth]))
        self.pipe = build_pipeline(FluxTransformer2DModel(**config).eval().to(device))
        self.device, self.index = device, STEPS
        self.inputs = {
            "hidden_states": torch.randn(1, 16, 4, device=device),
            "encoder_hidden_states": torch.randn(1, 4, 16, device=device),
            "pooled_projections": torch.randn(1, 16, device=device),
            "guidance": torch.full((1,), 3.5, device=device),
            "img_ids": torch.zeros(16, 3, device=device),
            "txt_ids": torch.zeros(4, 3, device=device),
            "return_dict": False,
        }
        self.features = torch.randn(1, 16, WIDTH, device=device)
        self.conditioning = torch.randn(1, WIDTH, device=device)

    def step(self):
        self.output = self.pipe.transformer(**self.inputs, timestep=self.timestep)[0]

    def own_head(self):
        transformer = self.pipe.transformer
        transformer.proj_out(transformer.norm_out(self.features, self.conditioning))

    def advance(self):
        scheduler = self.pipe.scheduler
        if self.index < STEPS:
            scheduler.step(self.output, scheduler.timesteps[self.index], self.inputs["hidden_states"])
            self.index += 1
        if self.index == STEPS:
            scheduler.set_timesteps(STEPS, device=self.device)
            scheduler.set_begin_index(0)
            self.index = 0
        self.timestep = scheduler.timesteps[self.index].expand(1) / 1000

    def advance_to_predicted(self):
        """Takes the next steps up to one that is predicted, and leaves that one to `step`."""
        self.advance()
        while self.index in COMPUTED:
            self.step()
            self.advance()
        synchronise(self.device)


@pytest.mark.parametrize("rank", [0, 32])
@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_predicted_step(benchmark, host_time, device, depth, rank):
    """What lesa does: the time of a predicted step without that of the model's own `norm_out` and `proj_out`.

    The first predicted step of a run conditions the head for all of them. It is one round in forty. On a GPU the step
    is fused and runs none of the model's own modules.
    """
    loop = Loop(depth, device)
    predictor = FusedKANPredictor(PredictorConfig(WIDTH, rank=rank)).to(device)
    with lesa.enable_cache(loop.pipe, predictor, COMPUTED, strict=True) as handle:
        host_time(benchmark, loop.step, loop.advance_to_predicted, None if device.type == "cuda" else loop.own_head)
        (stream,) = handle.stats.streams.values()
        assert set(stream.computed) <= set(COMPUTED) and set(stream.predicted).isdisjoint(COMPUTED)
        assert len(stream.predicted) == loop.index + 1 - len(stream.computed)
