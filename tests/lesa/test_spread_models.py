"""A transformer that two processes on the CPU share: context and tensor parallelism of diffusers, and FSDP.

The module is also the program of those processes: `python test_spread_models.py RANK FOLDER`. They run all cases and
save what they made in the folder. The tests compare it with what this process makes by itself.
"""

import json
import sys
import time
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from diffusers import ContextParallelConfig, TensorParallelConfig

import digits_pipelines
import lesa
from driven_loops import REST, SOME, STEPS
from lesa.artifacts import fingerprint
from lesa.cache import device_values
from lesa.demo import digits
from lesa.processes import processes_for
from lesa.training.trajectories import Trajectories
from predictors import make_predictor
from process_pairs import RANKS, copied_late, join, leave, run_in_two

NAN_BELOW = 0.45  # a noise level between those of steps 6 and 7, of which both are predicted
UNEVEN = {"height": 10, "width": 18}  # 45 tokens
OPTIONS = {"num_inference_steps": STEPS, "progress": False}
ROUNDING = {"rtol": 0, "atol": 2e-5}  # features are up to 13, and latents up to 4


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))


def blocks_of(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def ulysses(transformer):
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))


def uneven(transformer):
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS, ulysses_anything=True))


def with_sums(ctx, query, key, value, mask, dropout, is_causal, scale, enable_gqa, return_lse, *args, **options):
    """Attention that gives the logarithms of its sums too, as kernels for GPUs do, and torch's for the CPU does not."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    made = (scores.softmax(-1) @ value).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
    return made if return_lse else made[0]


def gathered_unevenly(tensor, dim, group):
    """What NCCL can do: gathering parts of several sizes. Over gloo, they must have one size."""
    parts = [None] * RANKS
    torch.distributed.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim)


def ring(transformer):
    transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=RANKS))


def tensor_parallel(transformer):
    transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=RANKS))


def sharded_head(transformer):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(transformer, mesh(), {"proj_out": ColwiseParallel(output_layouts=Replicate())})


def fsdp(transformer, **options):
    from torch.distributed.fsdp import fully_shard

    for part in (*blocks_of(transformer), transformer):
        fully_shard(part, mesh=mesh(), **options)


def resharded(transformer):
    fsdp(transformer, reshard_after_forward=True)


def fsdp_of_accelerate(transformer):
    """It shards the output head's norm by itself. On a CPU, `Accelerator.prepare` would not shard."""
    names = [type(block).__name__ for block in blocks_of(transformer)]
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({*names}),
        cpu_ram_efficient_loading=False,
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="no", is_main_process=False), transformer)


EXACT = [fsdp, resharded, fsdp_of_accelerate]
ROUNDED = [ulysses, uneven, ring, tensor_parallel, sharded_head]
WAYS = [*EXACT, *ROUNDED]
WHOLLY = [fsdp, ulysses, tensor_parallel]
"""One of each kind is tried with all functions, the others with recording and the cache."""
OWN_HEAD = [fsdp_of_accelerate, ulysses, uneven, ring, sharded_head]


def inputs_of(way):
    """Two inputs. The texts are of six tokens: each process gets as many of them."""
    torch.manual_seed(1)
    given = []
    for one in digits.inputs_for((3, 8)):
        texts = one["prompt_embeds"].repeat(1, 6, 1) + 0.1 * torch.randn(1, 6, digits.EMBEDDING_DIM)
        given.append({**one, "prompt_embeds": texts, **(UNEVEN if way is uneven else {})})
    return given


def generate(pipe, way):
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    return pipe(**inputs_of(way)[0], **options).images


def made_by(way, folder, spread=lambda transformer: None, late=False):
    """What one way makes: latents without and with the cache, and in the folder recording, predictor and evaluation."""
    pipe = digits_pipelines.cut_pipeline()
    spread(pipe.transformer)
    before, plain = fingerprint(pipe.transformer), generate(pipe, way)
    with lesa.enable_cache(pipe, make_predictor(), SOME) as handle:
        cached = generate(pipe, way)
    (stats,) = handle.stats.streams.values()
    inputs = inputs_of(way)
    trajectories = lesa.record(pipe, inputs, folder / "recorded", tokens_per_sample=30, **OPTIONS)
    made = {
        "off": plain,
        "cached": cached,
        "steps": (stats.computed, stats.predicted),
        "fused": stats.fused,
        "fingerprints": {before, fingerprint(pipe.transformer)},
        "together": not processes_for(pipe).is_divided,
    }
    return made if way not in WHOLLY else made | made_wholly(pipe, way, trajectories, folder, late)


def made_wholly(pipe, way, trajectories, folder, late):
    """What a run with a forecast that is not finite makes, and refining and evaluating."""
    inputs = inputs_of(way)
    with pytest.MonkeyPatch.context() as patch, lesa.enable_cache(pipe, make_predictor(NAN_BELOW), SOME) as broken:
        if late:  # what the device says is on the host only when it is waited for
            patch.setattr(device_values, "copy_to_host", copied_late)
        mended = generate(pipe, way)
    trained = lesa.train(trajectories, schedule=SOME, epochs=2, progress=False)
    refined = lesa.refine(trained, trajectories, pipe, inputs, rounds=1, epochs=1, progress=False)
    judged = lesa.evaluate(pipe, inputs, [refined], [f"steps-{len(SOME)}"], **OPTIONS, out_dir=folder / "judged")
    return {
        "mended": mended,
        "mended steps": [stream.computed for stream in broken.stats.streams.values()],
        "refined": refined.state_dict(),
        "quality": {run.name: run.psnr for run in judged.runs[1:]},
    }


def refusal_of(do):
    try:
        do()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(folder):
    """What lesa says of what does not work."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    said = {}
    pack = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    for wrap in (pack, DistributedDataParallel):
        pipe = digits_pipelines.cut_pipeline()
        pipe.transformer = wrap(pipe.transformer)
        name = type(pipe.transformer).__name__
        said[name] = refusal_of(lambda pipe=pipe: lesa.enable_cache(pipe))
        said[f"{name}, recorded"] = refusal_of(lambda pipe=pipe: record_one(pipe, folder))
    pipe = digits_pipelines.cut_pipeline()
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        for number, block in enumerate(blocks):
            blocks[number] = pack(block)
    with lesa.enable_cache(pipe, make_predictor(), SOME):
        said["blocks alone, cached"] = generate(pipe, None)
    said["blocks alone"] = refusal_of(lambda: record_one(pipe, folder))
    pipe = digits_pipelines.cut_pipeline()
    fsdp(pipe.transformer)
    levels = tuple(1 - step / STEPS for step in SOME)
    predictor = make_predictor(schedule=tuple(SOME), schedule_sigmas=levels, schedule_errors=(0.1,) * len(SOME))
    said["error control"] = refusal_of(lambda: lesa.enable_cache(pipe, predictor, lesa.ErrorControl(1.0)))
    unknown = SimpleNamespace(transformer=Unknown(), scheduler=pipe.scheduler)
    fully_shard(unknown.transformer, mesh=mesh())
    said["no adapter"] = refusal_of(lambda: lesa.enable_cache(unknown))
    return said


class Unknown(torch.nn.Module):
    """A transformer without an adapter."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))])

    def forward(self, hidden_states, timestep):
        return self.blocks[0](hidden_states)


def record_one(pipe, folder):
    return lesa.record(pipe, inputs_of(None)[:1], folder / "refused", **OPTIONS)


def work(rank, folder):
    """What one of the processes does."""
    from diffusers.hooks import context_parallel
    from diffusers.hooks import tensor_parallel as parallel
    from diffusers.models import attention_dispatch

    join(rank, folder)
    parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    results = {}
    for way in WAYS:
        begun = time.perf_counter()
        print(way.__name__, end=" ", flush=True)
        with pytest.MonkeyPatch.context() as patch:
            if way is uneven:
                patch.setattr(context_parallel, "_all_gather_anything", gathered_unevenly)
            if way is ring:
                patch.setattr(attention_dispatch, "_native_attention_forward_op", with_sums)
            results[way.__name__] = made_by(way, folder / way.__name__, way, late=rank == 0)
        print(f"{time.perf_counter() - begun:.1f} s", flush=True)
    results["refusals"] = refusals(folder)
    leave(rank, folder, results)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the two processes, and what each of them made."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_in_two(__file__, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same, made by this process alone, for even and for uneven tokens."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.warns(RuntimeWarning, match="the forecast was not finite"):
        return folder, {way: made_by(way, folder / way.__name__) for way in (fsdp, uneven)}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_two_processes_make_what_one_makes(shared, alone, way):
    same = {"rtol": 0, "atol": 0} if way in EXACT else ROUNDING
    wanted = alone[1][uneven if way is uneven else fsdp]
    assert (wanted["cached"] - wanted["off"]).abs().max() > 1e-2  # else there would be nothing to compare
    for result in shared[1]:
        ours = result[way.__name__]
        torch.testing.assert_close(ours["off"], wanted["off"], **same)
        fused_as_alone = way not in OWN_HEAD
        torch.testing.assert_close(ours["cached"], wanted["cached"], **(same if fused_as_alone else ROUNDING))
        assert ours["fused"] == (REST if fused_as_alone else [])
        assert ours["steps"] == wanted["steps"] == (SOME, REST)
        assert ours["fingerprints"] == wanted["fingerprints"] and len(wanted["fingerprints"]) == 1
        assert ours["together"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_recording_of_two_is_a_recording_of_one(shared, alone, way):
    (two, _), (one, _) = shared, alone
    ours, wanted = two / way.__name__ / "recorded", one / (uneven if way is uneven else fsdp).__name__ / "recorded"
    names = sorted(file.name for file in wanted.iterdir())
    assert names == sorted(file.name for file in ours.iterdir())
    if way in EXACT:
        assert all((ours / name).read_bytes() == (wanted / name).read_bytes() for name in names)
    assert json.loads((ours / "manifest.json").read_text()) == json.loads((wanted / "manifest.json").read_text())
    for our, other in zip(Trajectories(ours), Trajectories(wanted), strict=True):
        for name, value in vars(other).items():
            torch.testing.assert_close(getattr(our, name), value, **ROUNDING)
    assert torch.equal(Trajectories(ours).head_weight, Trajectories(wanted).head_weight)


@pytest.mark.slow
@pytest.mark.parametrize("way", WHOLLY, ids=lambda way: way.__name__)
def test_what_is_refined_and_judged_by_two_is_as_by_one(shared, alone, way):
    """And what a run makes in which one process hears late that a forecast was not finite, and the other at once."""
    wanted = alone[1][fsdp]
    for result in shared[1]:
        ours = result[way.__name__]
        torch.testing.assert_close(ours["mended"], wanted["mended"], **(ROUNDING if way in ROUNDED else {}))
        assert ours["mended steps"] == wanted["mended steps"] and len(ours["mended steps"][0]) == 9
        for name, value in wanted["refined"].items():
            torch.testing.assert_close(ours["refined"][name], value, rtol=0, atol=0 if way in EXACT else 1e-3)
        assert [*ours["quality"]] == [*wanted["quality"]]
        for name, psnr in wanted["quality"].items():
            assert ours["quality"][name] == pytest.approx(psnr, abs=0.01 if way in EXACT else 0.1)


@pytest.mark.slow
def test_what_does_not_work_is_refused_by_name(shared):
    inside = "Use the FluxTransformer2DModel inside. To shard it, call `torch.distributed.fsdp.fully_shard`."
    expected = {
        f"{wrapper}{more}": f"TypeError: `pipe` must have the model itself as transformer, but got a {wrapper} around "
        f"it. {inside}"
        for wrapper in ("FullyShardedDataParallel", "DistributedDataParallel")
        for more in ("", ", recorded")
    }
    expected["blocks alone"] = (
        "TypeError: `pipe` must have weights that can be compared with those of other runs, but got weights that FSDP "
        "has packed. Shard them with `torch.distributed.fsdp.fully_shard` instead of `FullyShardedDataParallel`."
    )
    expected["error control"] = (
        "ValueError: `ErrorControl` cannot be used where several processes share a transformer. Pass a list of steps: "
        "by the errors, the processes could choose different ones."
    )
    expected["no adapter"] = (
        "TypeError: `pipe` must have a transformer with an adapter, because several processes share it, but got a "
        "FSDPUnknown. Let each process have the whole transformer."
    )
    for results in shared[1]:
        said = {name: value for name, value in results["refusals"].items() if name != "blocks alone, cached"}
        assert said == expected


@pytest.mark.slow
def test_packed_blocks_can_be_cached(shared, alone):
    for results in shared[1]:
        assert torch.equal(results["refusals"]["blocks alone, cached"], alone[1][fsdp]["cached"])


if __name__ == "__main__":
    from pathlib import Path

    work(int(sys.argv[1]), Path(sys.argv[2]))
