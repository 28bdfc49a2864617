"""Several recordings as one."""

import pytest
import torch

import digits_pipelines
import lesa
from lesa.demo import digits
from lesa.training.joined import JoinedRollOuts, JoinedTrajectories
from lesa.training.refinement import RollOuts

STEPS, SCHEDULE = 8, [0, 2, 5]
QUICK = {"epochs": 2, "batch_size": 2, "progress": False}
INPUTS = digits.inputs_for(range(4))


@pytest.fixture(scope="module")
def own_pipe():
    return digits_pipelines.cut_pipeline()


def recorded(pipe, folder, first, end, seed=None):
    seed = first if seed is None else seed
    return lesa.record(pipe, INPUTS[first:end], folder, STEPS, tokens_per_sample=20, seed=seed, progress=False)


@pytest.fixture(scope="module")
def one(own_pipe, tmp_path_factory):
    return recorded(own_pipe, tmp_path_factory.mktemp("one"), 0, 4)


@pytest.fixture(scope="module")
def parts(own_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return [recorded(own_pipe, folder / "a", 0, 1), recorded(own_pipe, folder / "b", 1, 4)]


@pytest.fixture(scope="module")
def joined(parts):
    return JoinedTrajectories(parts, INPUTS)


def test_they_are_what_one_recording_of_all_samples_is(one, joined):
    assert joined.manifest == one.manifest and joined.names == one.names and joined.samples == one.samples
    assert joined.by_sample == one.by_sample and joined.run_sigmas == one.run_sigmas and len(joined) == len(one)
    for a, b in zip(joined, one, strict=True):
        assert all(torch.equal(value, vars(b)[name]) for name, value in vars(a).items())


def test_training_and_refining_give_the_same_weights(own_pipe, one, joined):
    trained = [lesa.train(each, schedule=SCHEDULE, **QUICK) for each in (one, joined)]
    options = {**QUICK, "rounds": 1}
    refined = [lesa.refine(each, own, own_pipe, INPUTS, **options) for each, own in zip(trained, (one, joined))]
    for pair in (trained, refined):
        assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in pair), strict=True))


def test_roll_outs_of_the_parts_are_those_of_the_whole(own_pipe, one, joined, tmp_path):
    predictor = lesa.train(one, schedule=SCHEDULE, **QUICK)
    whole = RollOuts(one, predictor, own_pipe, INPUTS, tmp_path / "whole", 1)
    ends = [(0, 1), (1, 4)]
    made = [
        RollOuts(part, predictor, own_pipe, INPUTS[slice(*between)], tmp_path / str(between), 1)
        for part, between in zip(joined.parts, ends)
    ]
    together = JoinedRollOuts(made)
    assert together.predictor == whole.predictor
    for number in range(len(one)):
        for a, b in zip(together.of(number), whole.of(number)):
            assert torch.equal(a, b)


def test_parts_that_do_not_continue_one_another_are_refused(own_pipe, parts, tmp_path):
    with pytest.raises(ValueError, match="`parts` must continue one another: the next seed is 1"):
        JoinedTrajectories([parts[0], recorded(own_pipe, tmp_path, 1, 4, seed=2)], INPUTS)
    with pytest.raises(ValueError, match="`inputs` must be one for each of the 4 samples, but got 3"):
        JoinedTrajectories(parts, INPUTS[:3])


def test_parts_of_other_conditions_are_refused(parts, tmp_path):
    pipe = digits_pipelines.cut_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] += 1
    with pytest.raises(ValueError, match="`transformer` must be .* as in the recording in"):
        JoinedTrajectories([parts[0], recorded(pipe, tmp_path, 1, 4)], INPUTS)
