"""One predicted step against one computed step, through the real hook on a FLUX transformer with random weights."""

import gc
import statistics
import time

import pytest
import torch
from floors import synchronise
from shapes import FLUX_53M

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
COMPUTED = (0, 2, 6, 12, 18, 25, 32, 39, 46)  # in a whole run
RUNS = 3
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


@torch.no_grad()
def test_whole_run(benchmark, device):
    """A run of the pipeline at rank 32: the time from step to step, with the scheduler and the loop of the pipeline.

    `extra_info` has the median of the predicted and of the computed steps, each the least of all runs, and what part of
    a run the computed steps take.
    """
    pipe, moments = Walk(FLUX_53M, device).pipe, []
    pipe.set_progress_bar_config(disable=True)
    side, text = int(FLUX_53M.image_tokens**0.5), FLUX_53M.text_dim
    arguments = {
        "prompt_embeds": torch.randn(1, FLUX_53M.text_tokens, text, device=device),
        "pooled_prompt_embeds": torch.randn(1, text, device=device),
        "latents": torch.randn(1, FLUX_53M.image_tokens, OUT_CHANNELS, device=device),
        **dict.fromkeys(("height", "width"), 2 * pipe.vae_scale_factor * side),
    }

    def on_step(pipe, step, timestep, tensors):
        synchronise(device)
        moments.append(time.perf_counter())
        return tensors

    def run():
        moments.clear()
        pipe(**arguments, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=on_step)
        return [after - before for before, after in zip(moments, moments[1:])]  # of the steps from the second on

    predictor = FusedKANPredictor(PredictorConfig(dim(FLUX_53M), rank=32)).to(device)
    benchmark.group = f"whole run {FLUX_53M}"
    runs = []
    with lesa.enable_cache(pipe, predictor, COMPUTED, strict=True) as handle:
        benchmark.pedantic(lambda: runs.append(run()), rounds=RUNS, warmup_rounds=1)
        assert handle.stats.predicted_steps == STEPS - len(COMPUTED)
    best = [min(times) for times in zip(*runs)]
    computed = [best[step - 1] for step in COMPUTED[1:]]
    predicted = [best[step - 1] for step in range(1, STEPS) if step not in COMPUTED]
    all_computed = len(COMPUTED) * statistics.mean(computed)
    benchmark.extra_info.update(
        predicted_step_s=statistics.median(predicted),
        computed_step_s=statistics.median(computed),
        computed_share=all_computed / (all_computed + sum(predicted)),
    )
