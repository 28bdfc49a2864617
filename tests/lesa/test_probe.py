"""The probe: predictions for a transformer that no adapter knows."""

import gc
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import lesa
import lesa.models
import more_pipelines
import small_pipelines
from lesa.models.probe import Probe
from lesa_kernels import FusedKANPredictor, PredictorConfig

STEPS = 12
SOME = [0, 1, 2, 5, 9]
REST = [step for step in range(STEPS) if step not in SOME]
DIM, WORDS, TILES = 8, 3, 5


def line():
    return FusedKANPredictor(PredictorConfig(mixer="linear"))


# A transformer that no library knows


class Early(nn.Module):
    """A block with a signature of its own, for pictures and words."""

    def __init__(self):
        super().__init__()
        self.mix, self.read = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, words, *, picture, wave, scale=None):
        picture = picture + torch.tanh(self.mix(picture) + self.read(words).mean(1, keepdim=True) + wave[:, None])
        return {"picture": picture, "words": (words + torch.tanh(self.read(words)), wave, scale)}


class Late(nn.Module):
    """A block for pictures and words together."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(DIM, DIM)

    def forward(self, tokens, wave):
        return tokens + torch.tanh(self.mix(tokens) + wave[:, None])


class Unknown(nn.Module):
    """Two lists of blocks. The words are dropped before the head."""

    def __init__(self):
        super().__init__()
        self.enter, self.enter_words, self.wave = nn.Linear(4, DIM), nn.Linear(6, DIM), nn.Linear(1, DIM)
        self.early = nn.ModuleList(Early() for _ in range(2))
        self.late = nn.ModuleList(Late() for _ in range(3))
        self.leave, self.last = nn.LayerNorm(DIM), nn.Linear(DIM, 4)

    def forward(self, sample, words, t, residual=None):
        picture, words, wave = self.enter(sample), self.enter_words(words), self.wave(t[:, None].to(sample))
        for block in self.early:
            made = block(words, picture=picture, wave=wave)
            picture, (words, *_) = made["picture"], made["words"]
            picture[:, :2] += 0.1  # in place
        tokens = torch.cat([words, picture], dim=1)
        for block in self.late:
            tokens = block(tokens, wave)
            if residual is not None:  # also after the last block
                tokens = tokens + residual
        return self.end(tokens[:, words.shape[1] :], wave)

    def end(self, picture, wave):
        return {"sample": self.last(self.leave(picture) * (1 + wave[:, None]))}["sample"], None


def pipe_with(transformer, **scheduler):
    """What a pipeline is to a loop that is written by hand."""
    return SimpleNamespace(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        _execution_device=torch.device("cpu"),
    )


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return pipe_with(Unknown())


def passed_as_is(t):
    return t


@torch.no_grad()
def drive(pipe, passed=lambda t: t / 1000, steps=STEPS, batch=2, words=WORDS, seed=0, **more):
    """The transformer's outputs on latents that move along a line, whatever it says."""
    generator = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(batch, TILES, 4, generator=generator), torch.randn(batch, words, 6, generator=generator)
    pipe.scheduler.set_timesteps(steps)
    outputs = []
    for step, t in enumerate(pipe.scheduler.timesteps):
        made = pipe.transformer(sample * (1 - 0.5 * step / steps), text, passed(t).expand(batch), **more)
        outputs.append(made[0] if isinstance(made, tuple) else made)
        pipe.scheduler.step(outputs[-1], t, sample)
    return outputs


@contextmanager
def counted(modules):
    """A list of how often each of the modules ran."""
    counts, hooks = [0] * len(modules), []
    for number, module in enumerate(modules):

        def count(*_, number=number):
            counts[number] += 1

        hooks.append(module.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(transformer):
    return [*transformer.early, *transformer.late]


def own_warnings(caught):
    return [str(w.message) for w in caught if str(w.message).startswith("lesa: ")]


def by_hand(pipe, **options):
    """What the transformer gives if its features are forecast along a line from the computed steps before."""
    features, transformer = [], pipe.transformer
    with transformer.leave.register_forward_pre_hook(lambda module, args: features.append(args[0].clone())):
        outputs = drive(pipe, **options)
    sigmas, waves = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps / 1000
    for step in REST:
        older, newer = [done for done in SOME if done < step][-2:]
        slope = (features[newer] - features[older]) / (sigmas[newer] - sigmas[older])
        forecast = features[newer] + slope * (sigmas[step] - sigmas[newer])
        outputs[step] = transformer.end(forecast, transformer.wave(waves[step].expand(len(forecast), 1)))[0]
    return outputs


def test_an_unknown_transformer_is_predicted_around_its_blocks(pipe):
    plain, wanted, blocks = drive(pipe), by_hand(pipe), blocks_of(pipe.transformer)
    before = [dict(vars(module)) for module in pipe.transformer.modules()]
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, counted(blocks) as counts:
        outputs = drive(pipe)
        again = drive(pipe)
    stream = handle.stats.streams["main"]
    assert (stream.computed, stream.predicted, stream.fused) == (SOME, REST, [])
    assert counts == [2 * len(SOME)] * len(blocks)
    assert any(note.startswith("probe: ") and "Unknown" in note for note in handle.stats.notes)
    for step in range(STEPS):
        assert torch.equal(outputs[step], again[step])
        assert torch.equal(outputs[step], plain[step]) if step in SOME else not torch.equal(outputs[step], plain[step])
        assert torch.allclose(outputs[step], wanted[step], atol=1e-6)
    ring = FusedKANPredictor(PredictorConfig(mixer="linear")).make_ring(2, TILES, torch.float32, "cpu", None, DIM)
    assert stream.ring_device_bytes == ring.device_nbytes  # the words are not among the features
    assert [dict(vars(module)) for module in pipe.transformer.modules()] == before
    assert all(map(torch.equal, drive(pipe), plain))


def test_all_steps_computed_are_bit_exact(pipe):
    plain = drive(pipe)
    with lesa.enable_cache(pipe, line(), range(STEPS), strict=True) as handle:
        assert all(map(torch.equal, drive(pipe), plain))
    assert handle.stats.streams["main"].computed == [*range(STEPS)]


def test_residuals_after_the_last_block_are_part_of_the_forecast(pipe):
    residual = torch.randn(2, WORDS + TILES, DIM, generator=torch.Generator().manual_seed(9))
    wanted = by_hand(pipe, residual=residual)
    with lesa.enable_cache(pipe, line(), SOME, strict=True):
        outputs = drive(pipe, residual=residual)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("passed", [passed_as_is, lambda t: t / 1000, lambda t: (1000 - t) / 1000])
def test_the_form_of_the_timesteps_is_learnt(pipe, passed):
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe, passed)
    assert handle.stats.streams["main"].predicted == REST


def test_timesteps_of_no_known_form_are_computed(pipe):
    plain = drive(pipe, lambda t: t / 7)
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="timestep is not one of"):
        assert all(map(torch.equal, drive(pipe, lambda t: t / 7), plain))
    assert handle.stats.unlocated == STEPS
