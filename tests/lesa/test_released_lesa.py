"""LESA as released, in runs of pipelines: the times of the run, and experts by stream of calls."""

import pytest
import torch

import lesa
import released_lesa
import small_pipelines as small
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SCHEDULE = lesa.Schedule.interval(4, STEPS, first=4)
CASE = small.ALL["qwen cfg"]


class Told(FusedKANPredictor):
    """Keeps what it was told of the run: by name of the stream, the times."""

    def plan(self, *arguments, **more):
        self.told[more["stream"]] = more["times"]
        return super().plan(*arguments, **more)


class ToldEachTime(FusedKANPredictor):
    """The same where each forecast is made on its own."""

    def forward(self, ring, sigma, times=None, stream=None):
        self.told[stream] = times
        return super().forward(ring, sigma, times, stream)


@pytest.fixture(scope="module")
def qwen():
    return CASE.build()


@pytest.fixture
def predictor(tmp_path):
    file = released_lesa.save(tmp_path / "two.pt", released_lesa.state_dict(STEPS, endings=("_cond", "_uncond")))
    return FusedKANPredictor.from_lesa_checkpoint(file, feature_dim=small.DIM, family="qwen-image")


@pytest.mark.parametrize("kind", [Told, ToldEachTime])
def test_a_run_tells_its_times_and_the_stream(qwen, predictor, kind):
    predictor.__class__, predictor.told = kind, {}
    with lesa.enable_cache(qwen, predictor, SCHEDULE) as cache:
        CASE.run(qwen, STEPS)
    assert {name: stream.computed for name, stream in cache.stats.streams.items()} == {
        name: list(SCHEDULE.steps) for name in ("cond", "uncond")
    }
    sigmas = qwen.scheduler.sigmas.tolist()
    assert len(sigmas) == STEPS + 1 and sigmas[-1] == 0
    assert predictor.told == {"cond": sigmas, "uncond": sigmas}


def test_what_each_stream_forecasts_comes_from_its_experts(qwen, predictor):
    """A picture changes with the experts of each stream."""
    pictures = []
    for changed in (None, 0, 1):
        if changed is not None:
            predictor.latent_bias.data[changed] += 0.5
        with lesa.enable_cache(qwen, predictor, SCHEDULE):
            pictures.append(CASE.latents(qwen, steps=STEPS))
    assert not torch.allclose(pictures[0], pictures[1]) and not torch.allclose(pictures[1], pictures[2])


def test_a_run_of_another_number_of_steps_is_an_error_before_anything_is_computed(qwen, predictor):
    message, ran = "`times` must be of a run that executes 12 steps.*got those of 13 executed steps", []
    handle = qwen.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with lesa.enable_cache(qwen, predictor, SCHEDULE), pytest.raises(ValueError, match=message):
        CASE.run(qwen, 13)
    assert not ran
    with lesa.enable_cache(qwen, predictor, range(13)):  # nothing is forecast
        CASE.run(qwen, 13)
    handle.remove()
    assert len(ran) == 26


def test_both_streams_are_trained_and_refined(qwen, tmp_path):
    inputs = [CASE.inputs(1)]
    recorded = lesa.record(qwen, inputs, tmp_path / "recorded", STEPS, progress=False)
    assert recorded.streams == [None, "uncond"]
    config = PredictorConfig(small.DIM, mixer="lesa", hidden=4, options={"streams": 2})
    stages = [lesa.train(recorded, config, SCHEDULE, epochs=1, progress=False)]
    stages.append(lesa.refine(stages[0], recorded, qwen, inputs, rounds=1, epochs=1, progress=False))
    assert stages[1].config == stages[0].config
    for stream in range(2):
        assert not torch.equal(stages[0].latent_bias[stream], stages[1].latent_bias[stream])
