"""Context parallelism of diffusers (Ulysses) over two processes on the CPU.

The module is also the program of those processes: `python test_context_parallel.py RANK FOLDER`. They run all cases and
save what they made in the folder. The tests compare it with what this process makes by itself.
"""

import sys
import time

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

import digits_pipelines
import lesa
from driven_loops import SOME, STEPS
from lesa.cache import device_values
from lesa.demo import digits
from predictors import make_predictor
from process_pairs import RANKS, copied_late, join, leave, run_in_two

NAN_BELOW = 0.45  # a noise level between those of steps 6 and 7, of which both are predicted
CASES = ["off", "everything", "cache first", "parallelism first", "disabled", "not finite", "found late"]


def flux_pipeline():
    return digits_pipelines.cut_pipeline()


def qwen_image_pipeline():
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


FAMILIES = {"flux": flux_pipeline, "qwen-image": qwen_image_pipeline}


def generate(pipe):
    """Latents of two images. The texts are of six tokens: each process gets as many of them."""
    torch.manual_seed(1)
    if isinstance(pipe, QwenImagePipeline):
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, 4:] = 0
        texts = {"prompt_embeds": torch.randn(2, 6, 24), "prompt_embeds_mask": mask, "height": 128, "width": 64}
        texts |= {"negative_prompt_embeds": torch.randn(2, 6, 24), "negative_prompt_embeds_mask": mask}
        texts["true_cfg_scale"] = 2.0
    else:
        inputs = digits.inputs_for((3, 8))
        texts = {n: torch.cat([i[n] for i in inputs]) for n in ("prompt_embeds", "pooled_prompt_embeds")}
        texts["prompt_embeds"] = texts["prompt_embeds"].repeat(1, 6, 1) + 0.1 * torch.randn(2, 6, digits.EMBEDDING_DIM)
        texts |= {"height": digits.SIDE, "width": digits.SIDE}
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    return pipe(**texts, num_inference_steps=STEPS, generator=generators, output_type="latent").images


def predictor_for(pipe, case):
    config = pipe.transformer.config
    below = NAN_BELOW if case in ("not finite", "found late") else None
    return make_predictor(below, dim=config.num_attention_heads * config.attention_head_dim, seed=2)


def run_case(family, case, parallelise=lambda transformer: None, late=False):
    """What one case makes: latents, how often the first block ran, and the steps of each stream.

    With `late`, what the device says is on the host only when it is waited for.
    """
    pipe, blocks = FAMILIES[family](), []
    schedule = range(STEPS) if case == "everything" else SOME
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    if case == "parallelism first":
        parallelise(pipe.transformer)
    handle = None if case == "off" else lesa.enable_cache(pipe, predictor_for(pipe, case), schedule)
    if case != "parallelism first":
        parallelise(pipe.transformer)
    if case == "disabled":
        generate(pipe)
        handle.disable()
        blocks.clear()
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(device_values, "copy_to_host", copied_late)
        latents = generate(pipe)
    streams = {} if handle is None else handle.stats.streams
    return {
        "latents": latents,
        "blocks": len(blocks),
        "steps": {name: (stream.computed, stream.predicted) for name, stream in streams.items()},
    }


def work(rank, folder):
    """What one of the processes does."""
    from diffusers import ContextParallelConfig

    join(rank, folder)

    def parallelise(transformer):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))

    results = {}
    for family in FAMILIES:
        for case in CASES:
            begun, late = time.perf_counter(), case == "found late" and rank == 0  # the other one finds it out at once
            print(f"{family}, {case} ...", end=" ", flush=True)
            results[family, case] = run_case(family, case, parallelise, late)
            print(f"{time.perf_counter() - begun:.1f} s", flush=True)
    leave(rank, folder, results)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the processes made, by family and case."""
    return run_in_two(__file__, tmp_path_factory.mktemp("context-parallel"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_two_processes_equal_one(results, family, case):
    if case in ("not finite", "found late"):
        with pytest.warns(RuntimeWarning, match="the forecast was not finite"):
            alone = run_case(family, case)
    else:
        alone = run_case(family, case)
    assert alone["latents"].isfinite().all()
    streams = 2 if family == "qwen-image" else 1
    computed = {"off": STEPS, "disabled": STEPS, "everything": STEPS, "not finite": 9, "found late": 9}
    assert alone["blocks"] == streams * computed.get(case, len(SOME))
    for result in results:
        ours = result[family, case]
        torch.testing.assert_close(ours["latents"], alone["latents"], rtol=0, atol=1e-5)
        assert (ours["blocks"], ours["steps"]) == (alone["blocks"], alone["steps"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_the_forecast_is_not_the_plain_run(results, family):
    """Else the cases above would compare nothing."""
    by_case = {case: results[0][family, case]["latents"] for case in CASES}
    for case in ("cache first", "not finite"):
        assert (by_case[case] - by_case["off"]).abs().max() > 1e-2


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
