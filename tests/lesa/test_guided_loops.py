"""Loops whose guidance is on in a part of the run: in one batch, by calls of its own, and by calls that skip layers."""

import pytest
import torch

import lesa
import small_pipelines as small
from driven_loops import FIRST, REST, SECOND, SOME, STEPS, call_arguments, drive
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.slow

ALL = [*range(STEPS)]


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


def solo(pipe, call, computed):
    """What the cache gives if the call is the only one of each step."""
    with lesa.enable_cache(pipe, line(), computed, strict=True):
        return drive(pipe, lambda step: [("it", call)])["it"]


def test_guidance_by_its_own_calls_keeps_its_history_while_it_is_off(pipe):
    on = [step for step in ALL if not 3 <= step < 8]

    def calls(step):
        return [("with", FIRST)] + [("without", SECOND)] * (step in on)

    plain = drive(pipe, calls)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = drive(pipe, calls)
    guided, unguided = (handle.stats.streams[name] for name in ("main", "main-2"))
    assert (guided.computed, guided.predicted) == (SOME, REST)
    assert (unguided.computed, unguided.predicted) == ([0, 1, 2, 9], [8, 10, 11])
    alone = solo(pipe, SECOND, [0, 1, 2, 9])
    assert all(torch.equal(cached["without"][step], alone[step]) for step in on)
    assert all(torch.equal(cached["without"][step], plain["without"][step]) for step in (0, 1, 2, 9))


@pytest.mark.parametrize("fresh", [False, True], ids=["texts that stay", "texts made anew"])
def test_guidance_that_begins_late_and_ends_early(pipe, fresh):
    """The call with the prompt comes first, as guiders do it, so the order is enough if texts are made anew."""

    def made(call):
        text = call["encoder_hidden_states"]
        return {**call, "encoder_hidden_states": text.clone() if fresh else text}

    def calls(step):
        return [("with", made(FIRST))] + [("without", made(SECOND))] * (3 <= step < 8)

    plain = drive(pipe, calls)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        cached = drive(pipe, calls)
    guided, unguided = (handle.stats.streams[name] for name in ("main", "main-2"))
    assert (guided.computed, guided.predicted) == (SOME, REST)
    assert (unguided.computed, unguided.predicted) == ([3, 5], [4, 6, 7])
    assert unguided.reasons == {3: "the first call of this stream", 5: "scheduled"}
    assert all(torch.equal(cached["without"][step], plain["without"][step]) for step in (3, 5))
    alone = solo(pipe, FIRST, SOME)
    assert all(torch.equal(cached["with"][step], alone[step]) for step in ALL)


def test_a_call_that_skips_layers_has_the_text_of_another_one(pipe):
    """In the steps 1 to 7, the third call has the text of the first one. A hook on a block makes it another stream."""
    block = pipe.transformer.transformer_blocks[0]

    def calls(step):
        return [("with", FIRST), ("without", SECOND)] + [("skipped", FIRST)] * (1 <= step < 8)

    number = iter(range(1000))
    skipped = {3 * step + 1 for step in range(1, 8)}  # of all calls

    def skip(module, args, kwargs, output):
        return (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if next(number) in skipped else None

    with block.register_forward_hook(skip, with_kwargs=True):
        plain = drive(pipe, calls)
    assert not torch.equal(plain["skipped"][4], plain["with"][4])
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe, calls)
    streams = handle.stats.streams
    assert [streams[name].computed for name in ("main", "main-2", "main-3")] == [SOME, SOME, [1, 2, 5]]
    assert streams["main-3"].predicted == [3, 4, 6, 7]


def test_guidance_in_one_batch_that_ends_and_comes_back(pipe):
    both, single = call_arguments(labels=(3, 8)), call_arguments(labels=(8,))

    def calls(step):
        return [("it", single if 4 <= step < 8 else both)]

    plain = drive(pipe, calls)["it"]
    with pytest.warns(RuntimeWarning, match="the shape changed"), lesa.enable_cache(pipe, line(), SOME) as handle:
        cached = drive(pipe, calls)["it"]
    stream = handle.stats.streams["main"]
    assert (stream.computed, stream.predicted) == ([0, 1, 2, 4, 5, 8, 9], [3, 6, 7, 10, 11])
    assert stream.reasons[4] == stream.reasons[8] == "the shape changed"
    assert all(torch.equal(cached[step], plain[step]) for step in stream.computed)


def test_a_batch_that_changes_in_a_run_is_not_recorded(tmp_path):
    """Otherwise the rows with the prompt would be written where those without it were."""
    import more_pipelines

    case = more_pipelines.ALL["z-image cfg"]
    inputs = [{**case.inputs(1), "cfg_truncation": 0.5}]
    with pytest.raises(ValueError, match="`inputs` must keep the batch .* got 1 instead of 2 rows at step 7, as if"):
        lesa.record(case.build(), inputs, tmp_path, STEPS, progress=False)
    assert not [*tmp_path.iterdir()]


def test_skipped_layers_of_an_ordinary_pipeline_are_recorded_without_their_stream(tmp_path):
    case = small.SD3["sd3 cfg"]
    pipe = case.build()
    inputs = {**case.inputs(1), "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}
    with pytest.warns(UserWarning, match="the stream 'main-2' is not recorded, because it is called in 5 of the 12"):
        made = lesa.record(pipe, [inputs], tmp_path, STEPS, progress=False)
    assert made.names == ["sample-00000", "sample-00000-main-with-prompt"]
