"""What a command does after an error of the pipeline: it repeats the call that failed, and nothing else."""

from types import SimpleNamespace

import pytest
import torch

from lesa import cli
from lesa.cli.trying import explained
from lesa.inputs import Sample, collate
from lesa.pipelines import run_pipeline

STEPS = 5
IN_LESA = {"__name__": "lesa.cache.anywhere"}
exec("def fail():\n    raise TypeError('a bug')", IN_LESA)


class Pipeline:
    """A pipeline that fails on prompts with "bad" in them, after its steps. It notes its prompts and its steps."""

    transformer = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self):
        self.ran, self.steps, self.in_step = [], [], None

    def __call__(self, prompt, embeds=None, num_inference_steps=50, callback_on_step_end=None, **more):
        prompts = prompt if isinstance(prompt, list) else [prompt]
        self.ran.append(prompts)
        for step in range(num_inference_steps):
            self.steps.append(step)
            if self.in_step is not None:
                self.in_step()
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, 0, {})
        if any("bad" in text for text in prompts):
            raise RuntimeError("bad words")
        return [torch.zeros(1)]


class Older(Pipeline):
    """A pipeline without callbacks."""

    def __call__(self, prompt, num_inference_steps=50, output_type=None, return_dict=True, generator=None):
        return super().__call__(prompt, None, num_inference_steps)


def samples_of(*prompts):
    return [
        Sample(f"x.jsonl, line {number}", {"prompt": text, "embeds": torch.full((1, 2), number)})
        for number, text in enumerate(prompts, 1)
    ]


def run(pipe, samples, size):
    """As the library does, in batches."""
    with explained(pipe, samples, STEPS):
        for start in range(0, len(samples), size):
            run_pipeline(pipe, collate([sample.arguments for sample in samples[start : start + size]]), [], STEPS)


def test_only_the_samples_of_the_call_that_failed_run_again():
    pipe, samples = Pipeline(), samples_of("a", "b", "c", "bad", "e", "f")
    with pytest.raises(cli.UsageError, match="x.jsonl, line 4: Pipeline fails on it, also without lesa: .*bad words"):
        run(pipe, samples, 2)
    assert pipe.ran == [["a", "b"], ["c", "bad"], ["c"], ["bad"]]


def test_equal_prompts_are_distinguished_by_their_tensors():
    pipe, samples = Pipeline(), samples_of("bad", "bad")
    with pytest.raises(cli.UsageError, match="line 1"):
        run(pipe, samples, 1)
    assert pipe.ran == [["bad"], ["bad"]]


def test_a_bug_in_a_step_repeats_one_step():
    pipe = Pipeline()

    def once():
        pipe.in_step = None
        IN_LESA["fail"]()

    pipe.in_step = once
    with pytest.raises(TypeError, match="a bug"):
        run(pipe, samples_of("a", "b"), 1)
    assert pipe.steps == [0, 0] and pipe.ran == [["a"], ["a"]]


def test_a_bug_outside_the_pipeline_repeats_nothing():
    pipe, samples = Pipeline(), samples_of("a", "bad")
    with pytest.raises(TypeError, match="a bug"), explained(pipe, samples, STEPS):
        raise TypeError("a bug")
    assert pipe.ran == []


def test_a_pipeline_without_callbacks_is_not_blamed_for_that():
    pipe, samples = Older(), [Sample("x.jsonl, line 1", {"prompt": "a"})]
    calls = iter([True])

    def once():
        if next(calls, False):
            raise TypeError("a bug")

    pipe.in_step = once
    with pytest.raises(TypeError, match="a bug"), explained(pipe, samples, STEPS):
        run_pipeline(pipe, {"prompt": ["a"]}, [], STEPS)
    assert pipe.ran == [["a"], ["a"]]
