"""One predicted step against one computed step, through the real hook on a FLUX transformer with random weights."""

import gc
import statistics

import pytest
import torch

from lesa_kernels import work

pytest.importorskip("diffusers")
from diffusers import FluxTransformer2DModel  # noqa: E402

import lesa  # noqa: E402
from lesa.demo.digits import build_pipeline  # noqa: E402
from lesa.estimation import transformer_flops  # noqa: E402
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 50
ANCHORS = [0, 1, 2, 3]  # enough to fill the predictor's history
OUT_CHANNELS = 64
COMPUTED_ROUNDS, PREDICTED_ROUNDS = 6, 40
MEDIANS = {}  # of the computed step by model, for the ratio


class Walk:
    """Calls the transformer step by step as a pipeline does, with fixed inputs."""

    def __init__(self, model, device):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(model.dtype)  # where it will be, and as it will be: large ones fit no other way
        try:
            with torch.device(device):
                transformer = FluxTransformer2DModel(**model.transformer_config()).eval()
        finally:
            torch.set_default_dtype(default)
        self.pipe = build_pipeline(transformer)
        self.pipe.scheduler.set_timesteps(STEPS, device=device)

        def randn(*shape):
            return torch.randn(shape, device=device).to(model.dtype)

        self.inputs = {
            "hidden_states": randn(1, model.image_tokens, 64),
            "encoder_hidden_states": randn(1, model.text_tokens, model.text_dim),
            "pooled_projections": randn(1, model.text_dim),
            "img_ids": torch.zeros(model.image_tokens, 3, device=device),
            "txt_ids": torch.zeros(model.text_tokens, 3, device=device),
        }
        self.steps = iter(range(STEPS))

    def step(self):
        timestep = self.pipe.scheduler.timesteps[next(self.steps)].reshape(1) / 1000
        return self.pipe.transformer(**self.inputs, timestep=timestep, return_dict=False)[0]


def dim(model) -> int:
    """Width of the features."""
    return model.num_attention_heads * 64


@pytest.fixture
def walk(model, device):
    """A model of which nothing is left afterwards; skips the benchmark where it has no room."""
    if device.type == "cuda":
        needed, free = model.parameters * model.dtype.itemsize * 1.3, torch.cuda.mem_get_info(device)[0]
        if needed > free:
            pytest.skip(f"{model} takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
    walk = Walk(model, device)
    yield walk
    vars(walk).clear()
    gc.collect()  # the hooks of diffusers refer to the model they are on
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def test_computed_step(benchmark, timed, against_floor, walk, model, device):
    plain = walk.step()
    walk.steps = iter(range(STEPS))
    predictor = FusedKANPredictor(PredictorConfig(walk.pipe.transformer.inner_dim)).to(device)
    with lesa.enable_cache(walk.pipe, predictor, range(STEPS)) as handle:
        assert torch.equal(walk.step(), plain)
        timed(walk.step, f"step {model}", rounds=COMPUTED_ROUNDS)
        assert handle.stats.predicted_steps == 0
    config = {**walk.pipe.transformer.config, "_class_name": type(walk.pipe.transformer).__name__}
    flops = transformer_flops(config, model.image_tokens, model.text_tokens)
    against_floor(benchmark, bytes=0, flops=flops, dtype=model.dtype)
    if benchmark.stats is not None:
        MEDIANS[model] = statistics.median(benchmark.stats.stats.data)


@pytest.mark.parametrize("rank", [0, 32])
@torch.no_grad()
def test_predicted_step(benchmark, timed, against_floor, walk, model, device, rank):
    predictor = FusedKANPredictor(PredictorConfig(walk.pipe.transformer.inner_dim, rank=rank)).to(device)
    predictor.backend = "torch"  # the plain form, through the model's own head
    with lesa.enable_cache(walk.pipe, predictor, ANCHORS):
        *_, anchor, plain = (walk.step() for _ in range(len(ANCHORS) + 1))
    predictor.backend = "auto"
    walk.steps = iter(range(STEPS))
    with lesa.enable_cache(walk.pipe, predictor, ANCHORS) as handle:
        *_, again, forecast = (walk.step() for _ in range(len(ANCHORS) + 1))
        assert torch.equal(again, anchor)
        # A step moves the velocity by far more than rounding does.
        assert (forecast - plain).norm() < 4 * torch.finfo(model.dtype).eps * plain.norm() < (plain - anchor).norm()
        timed(walk.step, f"step {model}", rounds=PREDICTED_ROUNDS)
        assert handle.stats.computed_steps == len(ANCHORS)
    least = work.predict_velocity(1, model.image_tokens, dim(model), model.dtype, OUT_CHANNELS, len(ANCHORS), rank)
    against_floor(benchmark, **least, dtype=model.dtype)
    if model in MEDIANS and benchmark.stats is not None:
        benchmark.extra_info["over_computed_step"] = statistics.median(benchmark.stats.stats.data) / MEDIANS[model]
