"""The probe: predictions for a transformer that no adapter knows."""

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import lesa
import lesa.models
import more_pipelines
import probed_pipelines
import small_pipelines
import small_wan
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
def drive(pipe, passed=lambda t: t / 1000, batch=2, dtype=torch.float32, **more):
    """The transformer's outputs on latents that move along a line, whatever it says."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, TILES, 4, generator=generator).to(dtype)
    text = torch.randn(batch, WORDS, 6, generator=generator).to(dtype)
    pipe.scheduler.set_timesteps(STEPS)
    outputs = []
    for step, t in enumerate(pipe.scheduler.timesteps):
        made = pipe.transformer(sample * (1 - 0.5 * step / STEPS), text, passed(t).expand(batch), **more)
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


class Embedding(Unknown):
    """A small list of blocks makes what the head needs."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(2))
        self.early, self.late = (nn.ModuleList(2 * [*blocks]) for blocks in (self.early, self.late))

    def end(self, picture, wave):
        for step in self.steps:
            wave = wave + step(wave)
        return super().end(picture, wave)


def test_lists_that_the_head_needs_run_in_each_step():
    torch.manual_seed(0)
    transformer = Embedding()
    early, late = (list(dict.fromkeys(blocks)) for blocks in (transformer.early, transformer.late))
    pipe = pipe_with(transformer)
    wanted = by_hand(pipe)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, counted([*early, *late]) as counts:
        outputs = drive(pipe)
    assert handle.stats.streams["main"].predicted == REST
    assert counts == [2 * len(SOME)] * len(counts)  # each is in its list twice
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(outputs, wanted, strict=True))


def test_residuals_after_the_last_block_are_part_of_the_forecast(pipe):
    residual = torch.randn(2, WORDS + TILES, DIM, generator=torch.Generator().manual_seed(9))
    wanted = by_hand(pipe, residual=residual)
    with lesa.enable_cache(pipe, line(), SOME, strict=True):
        outputs = drive(pipe, residual=residual)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("passed", [passed_as_is, lambda t: t / 1000, lambda t: (1000 - t) / 1000, lambda t: t - 1])
def test_the_form_of_the_timesteps_is_learnt(pipe, passed):
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe, passed)
    assert handle.stats.streams["main"].predicted == REST


def test_timesteps_that_begin_with_zero_are_located(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe, passed_as_is)
    assert handle.stats.streams["main"].predicted == REST


def test_a_form_that_a_later_call_refutes_is_dropped_in_the_run(pipe):
    """Reversed timesteps that begin at the middle look like others in the first call."""

    @torch.no_grad()
    def run():
        pipe.scheduler.set_timesteps(sigmas=[0.5 * (1 - step / STEPS) for step in range(STEPS)])
        for t in pipe.scheduler.timesteps:
            sample = torch.ones(1, TILES, 4)
            pipe.transformer(sample, torch.ones(1, WORDS, 6), ((1000 - t) / 1000)[None])
            pipe.scheduler.step(sample, t, sample)
        return handle.stats.streams["main"]

    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        assert [run().predicted, run().predicted] == [REST, REST]


def test_timesteps_of_no_known_form_are_computed(pipe):
    plain = drive(pipe, lambda t: t / 7)
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="timestep is not one of"):
        assert all(map(torch.equal, drive(pipe, lambda t: t / 7), plain))
    assert handle.stats.unlocated == STEPS


# Where it is refused


class Pyramid(nn.Module):
    """Blocks that change the shape, with skip connections, as in a U-Net."""

    class Down(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.narrow = nn.Linear(width, width // 2)

        def forward(self, x, wave):
            return self.narrow(x)

    class Up(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.widen = nn.Linear(width, 2 * width)

        def forward(self, x, skipped, wave):
            return self.widen(x) + skipped

    def __init__(self):
        super().__init__()
        self.enter, self.last = nn.Linear(4, DIM), nn.Linear(DIM, 4)
        self.down = nn.ModuleList([self.Down(DIM), self.Down(DIM // 2)])
        self.up = nn.ModuleList([self.Up(DIM // 4), self.Up(DIM // 2)])

    def forward(self, sample, words, t):
        x, skips = self.enter(sample), []
        for block in self.down:
            skips.append(x)
            x = block(x, t)
        for block in self.up:
            x = block(x, skips.pop(), t)
        return (self.last(x),)


class Twice(Unknown):
    """What its blocks make goes two ways to the output."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Linear(DIM, 4)

    def end(self, picture, wave):
        return super().end(picture, wave)[0] + self.beside(picture), None


class Paired(Twice):
    """It has two heads."""

    def end(self, picture, wave):
        return Unknown.end(self, picture, wave)[0], self.beside(picture)


class Skipping(Unknown):
    """An early block's output is added after the last one."""

    def forward(self, sample, words, t):
        picture, words, wave = self.enter(sample), self.enter_words(words), self.wave(t[:, None].to(sample))
        for block in self.early:
            picture = block(words, picture=picture, wave=wave)["picture"]
        tokens = picture
        for block in self.late:
            tokens = block(tokens, wave)
        return self.last(self.leave(tokens)) + self.last(picture), None


class Headless(Unknown):
    """No module comes after the blocks."""

    def end(self, picture, wave):
        return picture[..., :4] * (1 + wave[:, None, :4]), None


class Direct(Unknown):
    """It calls the forward of its blocks."""

    def forward(self, sample, words, t):
        picture, wave = self.enter(sample), self.wave(t[:, None].to(sample))
        for block in self.late:
            picture = block.forward(picture, wave)
        return self.end(picture, wave)


class Careful(Unknown):
    """It looks at what its blocks make."""

    def end(self, picture, wave):
        if picture.isnan().any():
            raise ArithmeticError("NaN in the picture")
        return super().end(picture, wave)


class Remembering(Unknown):
    """Its blocks add to a tensor, which is also weakly in the output."""

    class Changing(Late):
        def forward(self, tokens, memory, wave):
            memory += (tokens := super().forward(tokens, wave))
            return tokens, memory

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.ModuleList(), nn.ModuleList(self.Changing() for _ in range(3))

    def forward(self, sample, words, t):
        picture, wave = self.enter(sample), self.wave(t[:, None].to(sample))
        memory = torch.zeros_like(picture)
        for block in self.late:
            picture, memory = block(picture, memory, wave)
        return self.end(picture, wave)[0] + 1e-9 * memory[..., :4], None


class Random(Unknown):
    """It is another function in each call."""

    def end(self, picture, wave):
        self.last.bias += 0.1
        return super().end(picture, wave)


REFUSED = {
    Pyramid: "the blocks cannot be passed over: a Down of `down` returns a tensor",
    Remembering: "the blocks cannot be passed over: a Changing of `late` changes an argument in place",
    Twice: "what the blocks make reaches the output in more than one way",
    Paired: "what the blocks make reaches the output in more than one way",
    Skipping: "what the blocks make reaches the output in more than one way",
    Headless: "no module after the last block gets what the blocks have made",
    Direct: "the forward does not call the blocks of the transformer",
    Careful: "the forward cannot run without its blocks: ArithmeticError: NaN in the picture",
    Random: "the forward gives another output when it runs again",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_certain_is_computed_or_refused_by_name(kind):
    torch.manual_seed(0)
    pipe = pipe_with(kind())
    with lesa.enable_cache(pipe, line(), SOME) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = drive(pipe)
    stream = handle.stats.streams["main"]
    assert stream.computed == [*range(STEPS)] and not stream.predicted
    assert all(stream.reasons[step].startswith(REFUSED[kind]) for step in REST)
    assert len(own_warnings(caught)) == 1 and REFUSED[kind] in own_warnings(caught)[0]
    if kind is not Random:
        assert all(map(torch.equal, outputs, drive(pipe)))
    with lesa.enable_cache(pipe, line(), SOME, strict=True), pytest.raises(RuntimeError, match=REFUSED[kind]):
        drive(pipe)


@pytest.mark.parametrize("kind", [Unknown, Remembering])
def test_changes_in_place_are_seen_in_inference_mode(kind):
    """Tensors that are made there have no version."""
    torch.manual_seed(0)
    pipe = pipe_with(kind())
    with lesa.enable_cache(pipe, line(), SOME) as handle, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drive.__wrapped__(pipe)
    assert handle.stats.streams["main"].predicted == (REST if kind is Unknown else [])


class Flat(nn.Sequential):
    """It has no list of blocks."""

    def forward(self, sample, t):
        return super().forward(sample)


class Timeless(Unknown):
    """Its forward takes no timestep."""

    def forward(self, sample, words):
        return super().forward(sample, words, torch.ones(len(sample)))


@pytest.mark.parametrize(
    "transformer, lacks",
    [
        (Flat(), "a Flat without a list of blocks"),
        (Timeless(), "a Timeless without an argument timestep"),
    ],
)
def test_a_transformer_that_cannot_be_watched_is_refused_at_once(transformer, lacks):
    pipe = pipe_with(transformer)
    for function in (lesa.enable_cache, lesa.disable_cache):
        with pytest.raises(TypeError, match=f"`pipe` must have a transformer that lesa can use, but got {lacks}"):
            function(pipe)


def test_only_the_cache_has_probes(pipe):
    assert isinstance(lesa.models.adapters_or_probes(pipe)["transformer"], Probe)
    with pytest.raises(TypeError, match="For others, only `lesa.enable_cache` works"):
        lesa.models.adapters_for(pipe)


def test_what_needs_an_adapter_is_refused_by_name(pipe, tmp_path):
    for use in (
        lambda: lesa.record(pipe, [{}], tmp_path, STEPS, progress=False),
        lambda: lesa.evaluate(pipe, [{}], [], [], STEPS, progress=False),
    ):
        with pytest.raises(TypeError, match="supported family .*but got SimpleNamespace with a Unknown"):
            use()
    for trained in (PredictorConfig(DIM), PredictorConfig(DIM, family="flux"), PredictorConfig(DIM + 1)):
        with pytest.raises(ValueError, match="`predictor` must have nothing to train, .* no adapter for Unknown"):
            lesa.enable_cache(pipe, FusedKANPredictor(trained), SOME)
    with pytest.raises(ValueError, match="config.family` must be 'probe'"):
        lesa.enable_cache(pipe, FusedKANPredictor(PredictorConfig(mixer="linear", family="flux")), SOME)


# Pipelines that have an adapter, as if they had none

EXPERTS = ["wan 2.2 cfg"]
PIPELINES = ["flux", "flux controlnet", "qwen cfg", "hunyuan image replace", "sd3 cfg", *EXPERTS]
OTHERS = {
    "cogvideox": "the adapter's features come after the norm that is the first module after the blocks",
    "ltx-2 cfg": "it has two heads",
    "sana": "it gets timesteps of a scale of its own",
}
PIPELINES += sorted({*more_pipelines.QUICK.values()} - {*OTHERS}) + ["sana cfg"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "flux" else pytest.mark.slow) for n in PIPELINES])
def test_the_probe_gives_what_the_adapter_gives(name, monkeypatch):
    case = (small_pipelines.ALL | more_pipelines.ALL | small_wan.EXPERTS)[name]
    pipe = case.build()
    plain, adapters = case.latents(pipe, steps=STEPS), lesa.models.adapters_for(pipe).values()
    with ExitStack() as stack:
        for adapter in adapters:  # a hook, so that the modules of the head run
            stack.enter_context(adapter.projection.register_forward_hook(lambda *_: None))
        known = stack.enter_context(lesa.enable_cache(pipe, line(), SOME, strict=True)).stats
        wanted = case.latents(pipe, steps=STEPS)
    monkeypatch.setattr(lesa.models, "ADAPTERS", ())
    before = [dict(vars(module)) for module in pipe.transformer.modules()]
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, ExitStack() as stack:
        counts = [stack.enter_context(counted(adapter.blocks)) for adapter in adapters]
        latents = case.latents(pipe, steps=STEPS)
    streams = handle.stats.streams
    assert any(note.startswith("probe: ") for note in handle.stats.notes)
    assert not any(stream.fused for stream in streams.values())
    both = {name: (stream.computed, stream.predicted) for name, stream in known.streams.items()}
    assert {name: (stream.computed, stream.predicted) for name, stream in streams.items()} == both
    assert name in EXPERTS or both == dict.fromkeys(case.streams, (SOME, REST))
    ran = sum(len(stream.computed) for stream in streams.values()) * case.runs
    assert sum(each[0] for each in counts) == ran and all(len({*each}) == 1 for each in counts)
    assert (latents - wanted).norm() < 20 * torch.finfo(torch.float32).eps * wanted.norm()
    with lesa.enable_cache(pipe, line(), range(STEPS), strict=True):
        assert torch.equal(case.latents(pipe, steps=STEPS), plain)
    assert [dict(vars(module)) for module in pipe.transformer.modules()] == before
    assert torch.equal(case.latents(pipe, steps=STEPS), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", probed_pipelines.CASES)
def test_pipelines_without_an_adapter(name):
    case = probed_pipelines.CASES[name]
    pipe = case.build()
    assert case.pipeline in probed_pipelines.PROBED[type(pipe.transformer).__name__]
    plain, blocks = case.latents(pipe, steps=STEPS), Probe(pipe, pipe.transformer).blocks
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, counted(blocks) as counts:
        latents = case.latents(pipe, steps=STEPS)
    streams = handle.stats.streams
    assert [*streams] == [*case.streams]
    assert all((stream.computed, stream.predicted) == (SOME, REST) for stream in streams.values())
    assert counts == [len(SOME) * len(streams)] * len(counts)
    with lesa.enable_cache(pipe, line(), [0], strict=True):
        held = case.latents(pipe, steps=STEPS)
    assert 0 < (latents - plain).norm() < 0.25 * (held - plain).norm()
    with lesa.enable_cache(pipe, line(), range(STEPS), strict=True):
        assert torch.equal(case.latents(pipe, steps=STEPS), plain)
    assert torch.equal(case.latents(pipe, steps=STEPS), plain)


# What happens in a run


class Failure(Exception):
    """Raised by a test."""


@pytest.mark.parametrize("module", ["leave", "enter"])
def test_an_error_in_a_predicted_step_restores_the_blocks(pipe, module):
    plain, transformer = drive(pipe), pipe.transformer
    before = [dict(vars(part)) for part in transformer.modules()]
    fails_at = SOME[-1] + 1

    def fail(part, args):
        if handle.stats.streams["main"].computed == SOME and handle.stats.streams["main"].reasons:
            raise Failure

    with lesa.enable_cache(pipe, line(), SOME) as handle:
        with getattr(transformer, module).register_forward_pre_hook(fail), pytest.raises(Failure):
            drive(pipe)
        assert len(handle.stats.streams["main"].predicted) == fails_at - len(SOME)
        drive(pipe)
        assert handle.stats.streams["main"].predicted == REST
    after = [dict(vars(part)) for part in transformer.modules()]
    assert after == before
    assert all(map(torch.equal, drive(pipe), plain))


def test_hooks_on_blocks_do_not_run_in_predicted_steps(pipe):
    """Such as those that load the weights of a block for its call."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Loading(ModelHook):
        loads = 0

        def pre_forward(self, module, *args, **kwargs):
            Loading.loads += 1
            return args, kwargs

    plain, blocks = drive(pipe), blocks_of(pipe.transformer)
    for block in blocks:
        add_hook_to_module(block, Loading())
    with lesa.enable_cache(pipe, line(), SOME, strict=True):
        drive(pipe)
    assert Loading.loads == len(SOME) * len(blocks)
    for block in blocks:
        remove_hook_from_module(block)
    assert all(map(torch.equal, drive(pipe), plain))


def test_streams_have_their_own_ways(pipe):
    """Calls with and without guidance have texts of other lengths, and one has residuals."""
    scheduler, transformer = pipe.scheduler, pipe.transformer
    residual = torch.ones(1, 2 + TILES, DIM)
    text, other = torch.randn(1, WORDS, 6), torch.randn(1, 2, 6)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, torch.no_grad():
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            transformer(torch.ones(1, TILES, 4), text, (t / 1000)[None])
            transformer(torch.ones(1, TILES, 4), other, (t / 1000)[None], residual=residual)
            scheduler.step(torch.ones(1, TILES, 4), t, torch.ones(1, TILES, 4))
    assert {name: stream.predicted for name, stream in handle.stats.streams.items()} == {"main": REST, "main-2": REST}


def test_another_size_of_the_words_in_a_run_is_computed(pipe):
    scheduler = pipe.scheduler
    with lesa.enable_cache(pipe, line(), SOME) as handle, torch.no_grad():
        scheduler.set_timesteps(STEPS)
        for step, t in enumerate(scheduler.timesteps):
            text = torch.ones(1, WORDS + (step == 7), 6)
            with pytest.warns(RuntimeWarning, match="shape changed") if step == 7 else nullcontext():
                pipe.transformer(torch.ones(1, TILES, 4), text, (t / 1000)[None])
            scheduler.step(torch.ones(1, TILES, 4), t, torch.ones(1, TILES, 4))
    stream = handle.stats.streams["main"]
    assert stream.reasons[7] == stream.reasons[8] == "the shape changed"
    assert stream.predicted == [step for step in REST if step not in (7, 8)]


class Hasty(Unknown):
    """Below a noise level, it leaves out a block."""

    def forward(self, sample, words, t):
        picture, words, wave = self.enter(sample), self.enter_words(words), self.wave(t[:, None].to(sample))
        for block in self.late[: 3 if t[0] > 0.5 else 2]:
            picture = block(picture, wave)
        return self.end(picture, wave)


def test_a_call_that_goes_another_way_is_computed():
    torch.manual_seed(0)
    pipe = pipe_with(Hasty())
    plain = drive(pipe)
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="went another way"):
        outputs = drive(pipe)
    stream = handle.stats.streams["main"]
    late = [step for step in range(STEPS) if pipe.scheduler.timesteps[step] <= 500]
    first = late[0]
    assert first in REST and stream.reasons[first].endswith("went another way than in the computed steps")
    assert torch.equal(outputs[first], plain[first]) and stream.predicted == [s for s in REST if s != first]


class Turning(Unknown):
    """Below a noise level, another module comes after its blocks."""

    def end(self, picture, wave):
        if self.is_late:
            return self.last(20 * picture), None
        return super().end(picture, wave)

    def forward(self, sample, words, t):
        self.is_late = t[0] < 0.6  # from step 5 on
        return super().forward(sample, words, t)


def test_features_from_another_place_begin_a_new_history():
    torch.manual_seed(0)
    pipe = pipe_with(Turning())
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        outputs = drive(pipe)
    stream = handle.stats.streams["main"]
    assert (stream.computed, stream.predicted) == (SOME, REST)
    assert {step for step in SOME if stream.reasons[step] != "scheduled"} == {5}
    assert stream.reasons[5].startswith("the features came from another place of the transformer")
    assert all(torch.equal(outputs[step], outputs[5]) for step in (6, 7, 8))  # along a line through one point


class Guided(Unknown):
    """It takes tensors that both kinds of calls share, and some that are new in each call, before the words."""

    def forward(self, sample, t, ids, strength, context):
        return super().forward(sample, context, t)


@torch.no_grad()
def drive_guided(pipe, words, ends_at=STEPS):
    """The outputs of the second kind of calls. The first kind has no calls from a step on."""
    ids, sample, outputs = torch.zeros(TILES, 2), torch.ones(1, TILES, 4), []
    pipe.scheduler.set_timesteps(STEPS)
    for step, t in enumerate(pipe.scheduler.timesteps):
        for text in words if step < ends_at else words[1:]:
            text = text() if callable(text) else text
            made = pipe.transformer(sample, (t / 1000)[None], ids, torch.ones(1), text)[0]
        outputs.append(made)
        pipe.scheduler.step(made, t, sample)
    return outputs


@pytest.mark.parametrize("ends_at", [1, 4, 6])
def test_calls_are_told_apart_by_the_inputs_that_differ(ends_at):
    torch.manual_seed(0)
    pipe, words = pipe_with(Guided()), [torch.randn(1, WORDS, 6) for _ in range(2)]
    with lesa.enable_cache(pipe, line(), SOME, strict=True):
        wanted = drive_guided(pipe, words[1:])
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        outputs = drive_guided(pipe, words, ends_at)
    assert all(map(torch.equal, outputs, wanted))
    assert handle.stats.streams["main-2"].predicted == REST
    assert handle.stats.streams["main"].predicted == [step for step in REST if step < ends_at]


def test_calls_that_nothing_tells_apart_are_computed():
    torch.manual_seed(0)
    pipe, words = pipe_with(Guided()), [torch.randn(1, WORDS, 6) for _ in range(2)]
    plain, new = drive_guided(pipe, words), [words[0].clone, words[1].clone]
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="different streams"):
        assert all(map(torch.equal, drive_guided(pipe, new, 6), plain))
    assert not any(stream.predicted for stream in handle.stats.streams.values())


def test_a_new_text_in_a_run_is_computed():
    torch.manual_seed(0)
    pipe, words = pipe_with(Guided()), [torch.randn(1, WORDS, 6) for _ in range(2)]
    texts = iter(7 * [words[0]] + 5 * [words[1]])
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="the text changed"):
        drive_guided(pipe, [lambda: next(texts)])
    stream = handle.stats.streams["main"]
    assert stream.reasons[7] == "the text changed" and stream.predicted == [step for step in REST if step != 7]


class Either(Unknown):
    """It gets its sample by one of two names, or not at all."""

    def forward(self, hidden_states=None, words=None, t=None, latents=None):
        latents = torch.ones(len(t), TILES, 4) if latents is None else latents
        words = torch.ones(len(t), WORDS, 6) if words is None else words
        return super().forward(latents if hidden_states is None else hidden_states, words, t)


@pytest.mark.parametrize("names", [("latents", "words"), ("words", "hidden_states"), ("latents",), ()])
def test_tensors_may_be_left_out(names):
    torch.manual_seed(0)
    pipe = pipe_with(Either())
    sample = torch.ones(2, TILES, 4)
    values = {"latents": sample, "hidden_states": sample, "words": torch.ones(2, WORDS, 6)}
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle, torch.no_grad():
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            pipe.transformer(t=(t / 1000).expand(2), **{name: values[name] for name in names})
            pipe.scheduler.step(sample, t, sample)
    assert handle.stats.streams["main"].predicted == REST


class Apart(Unknown):
    """It gives each sample as a tensor of its own."""

    def end(self, picture, wave):
        made = super().end(picture, wave)[0]
        return {"none": None, "first": made[:1], "others": [made[1:]]}


class Bare(Unknown):
    """It gives a tensor."""

    def end(self, picture, wave):
        return super().end(picture, wave)[0]


@pytest.mark.parametrize("kind", [Unknown, Apart, Bare])
def test_nan_anywhere_in_the_output_of_a_predicted_step_is_seen(kind):
    torch.manual_seed(0)
    pipe = pipe_with(kind())
    sample, words = torch.ones(2, TILES, 4), torch.ones(2, WORDS, 6)

    def spoil(module, args, output):
        if pipe.scheduler.step_index == 3:
            output[1:] = torch.nan

    pipe.transformer.last.register_forward_hook(spoil)
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="was not finite"):
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            with torch.no_grad():
                pipe.transformer(sample, words, (t / 1000).expand(2))
            pipe.scheduler.step(sample, t, sample)
    assert not handle.stats.streams["main"].predicted


@pytest.mark.slow
def test_blocks_can_be_compiled_and_the_whole_cannot():
    torch.manual_seed(0)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe = pipe_with(Unknown())
    wanted = by_hand(pipe)
    for block in blocks_of(pipe.transformer):
        block.compile(backend=compiler)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        outputs = drive(pipe)
        assert handle.stats.streams["main"].predicted == REST
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(outputs, wanted, strict=True))
    assert graphs and all(block._compiled_call_impl is not None for block in blocks_of(pipe.transformer))
    pipe = pipe_with(Unknown())
    pipe.transformer.compile(backend="eager")
    with lesa.enable_cache(pipe, line(), SOME) as handle, pytest.warns(RuntimeWarning, match="compile only the blocks"):
        drive(pipe)
    stream = handle.stats.streams["main"]
    assert stream.computed == [*range(STEPS)] and "where lesa can watch it" in stream.reasons[REST[0]]


class InFloat32(Unknown):
    """Its head begins in float32."""

    def __init__(self):
        super().__init__()
        self.leave = nn.LayerNorm(DIM, elementwise_affine=False)

    def end(self, picture, wave):
        return super().end(self.leave(picture.float()).to(picture.dtype), wave)


def test_what_is_in_bfloat16_is_kept_in_bfloat16():
    torch.manual_seed(0)
    pipe = pipe_with(InFloat32().bfloat16())
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        outputs = drive(pipe, dtype=torch.bfloat16)
    assert outputs[REST[0]].dtype == torch.bfloat16
    ring = line().make_ring(2, TILES, torch.bfloat16, "cpu", None, DIM)
    assert handle.stats.ring_device_bytes == ring.device_nbytes


def test_lora_that_is_loaded_between_runs_is_seen(pipe):
    """It wraps the module at which the features come in."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    pipe.transformer.leave = nn.Linear(DIM, DIM)
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe)
        config = peft.LoraConfig(r=2, target_modules=["leave", "mix"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, pipe.transformer)
        outputs = drive(pipe)
        assert handle.stats.streams["main"].predicted == REST
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(outputs, by_hand(pipe), strict=True))


def test_gradient_checkpointing_is_computed(pipe):
    class Checkpointed(Unknown):
        gradient_checkpointing = True

    torch.manual_seed(0)
    pipe = pipe_with(Checkpointed())
    with lesa.enable_cache(pipe, line(), SOME, strict=True) as handle:
        drive(pipe)
        assert handle.stats.streams["main"].predicted == REST  # without gradients
        with torch.enable_grad(), pytest.raises(RuntimeError, match="gradient checkpointing is on"):
            drive.__wrapped__(pipe)
