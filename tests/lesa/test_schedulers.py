"""Every scheduler of diffusers in the pipelines of every family: exact with the cache, or refused by the pipeline."""

import re
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch

import lesa
import small_pipelines as small
from lesa_kernels import FusedKANPredictor, PredictorConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # schedulers use what NumPy deprecates

STEPS = 12
SOME = [0, 1, 4, 8]

CASES = (
    "flux",
    "flux img2img",
    "qwen",
    "qwen img2img",
    "hunyuan",
    "sd3",
    "sd3 img2img cfg",
)
"""One pipeline for each way in which the families' pipelines use their scheduler."""

OPTIONS = {
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "velocity": {"prediction_type": "flow_prediction"},
    "shift-12": {"shift": 12.0, "use_dynamic_shifting": False},
    "shift-7": {"flow_shift": 7.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"time_shift_type": "linear"},
    "terminal": {"shift_terminal": 0.02},
    "inverted": {"invert_sigmas": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "stochastic": {"stochastic_sampling": True},
    "order-1": {"solver_order": 1},
    "order-3": {"solver_order": 3},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "euler-at-end": {"euler_at_final": True},
    "no-prk": {"skip_prk_steps": True},
}
"""By name, what is changed in a scheduler's configuration."""

REFUSALS = {
    "sigmas": "does not support custom sigmas",
    "flow": "only supported when `use_flow_sigmas=True`",
    "mu": "unexpected keyword argument 'mu'",
    "no-mu": "`mu` must be passed when `use_dynamic_shifting`",
    "noise": "has no attribute 'scale_noise'",
    "predicts": "prediction_type given as flow_prediction must be one of",
    "order": "has no attribute 'order'",
    "step": "has no attribute 'step'",
    "missing": "missing [12] required positional argument",
    "config": "^None$",
    "list": "must be a list or torch.Tensor",
    "array": "'numpy.ndarray' object has no attribute 'to'",
    "falling": "strictly decreasing values",
    "middle": "Intermediate timesteps for SCM is not supported",
    "distilled": "only supports its configured distilled timestep schedule",
    "divisible": "not divisible by n_grid",
}
"""What diffusers says where a pipeline does not work with a scheduler, with a cache or without one."""

TABLE = """
FlowMatchEulerDiscrete                    12       12       12       12       12       12       12
FlowMatchEulerDiscrete +shift-12          12       12       12       12       12       12       12
FlowMatchEulerDiscrete +dynamic           12       12       12       12       no-mu    12       12
FlowMatchEulerDiscrete +dynamic +linear   12       12       12       12       no-mu    12       12
FlowMatchEulerDiscrete +terminal          12       12       12       12       12       12       12
FlowMatchEulerDiscrete +inverted          12       12       12       12       12       12       12
FlowMatchEulerDiscrete +karras            12       12       12       12       12       12       12
FlowMatchEulerDiscrete +exponential       12       12       12       12       12       12       12
FlowMatchEulerDiscrete +beta              12       12       12       12       12       12       12
FlowMatchEulerDiscrete +stochastic        12       12       12       12       12       12       12
FlowMatchHeunDiscrete                     sigmas   sigmas   sigmas   sigmas   sigmas   23       23
FlowMatchLCM                              12       12       12       12       12       12       12
FlowMapEulerDiscrete                      mu       mu       mu       mu       12       12       12
LTXEulerAncestralRF                       list     list     list     list     list     12       noise
MiniMaxH3                                 mu       mu       mu       mu       falling  11       11
DPMSolverMultistep                        sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow                  12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +shift-7         12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +order-1         12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +order-3         12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +dynamic         12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +sde             12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +velocity +karras      sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +velocity +exponential sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +velocity +beta        sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep                       sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep +flow                 12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep +flow +order-3        12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep +flow +dynamic        12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep +flow +sde            12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverSinglestep +velocity +karras     sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
UniPCMultistep                            flow     flow     flow     flow     flow     12       noise
UniPCMultistep +flow                      12       noise    12       noise    12       12       noise
UniPCMultistep +flow +order-3             12       noise    12       noise    12       12       noise
UniPCMultistep +flow +dynamic             12       noise    12       noise    no-mu    12       noise
UniPCMultistep +velocity +karras          flow     flow     flow     flow     flow     12       noise
UniPCMultistep +velocity +exponential     flow     flow     flow     flow     flow     12       noise
UniPCMultistep +velocity +beta            flow     flow     flow     flow     flow     12       noise
DEISMultistep                             sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DEISMultistep +flow                       12       sigmas   sigmas   sigmas   sigmas   12       noise
DEISMultistep +flow +dynamic              12       sigmas   sigmas   sigmas   sigmas   12       noise
DEISMultistep +velocity +karras           sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
SASolver                                  sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
SASolver +flow                            mu       sigmas   sigmas   sigmas   sigmas   12       noise
SASolver +velocity +karras                sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +velocity +lu          sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistep +flow +euler-at-end    12       sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistepInverse                 sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DPMSolverMultistepInverse +flow           mu       sigmas   sigmas   sigmas   sigmas   12       noise
EDMDPMSolverMultistep                     sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
EDMEuler                                  mu       mu       mu       mu       array    12       noise
EulerDiscrete                             mu       mu       mu       mu       11       12       noise
EulerAncestralDiscrete                    sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
HeunDiscrete                              sigmas   sigmas   sigmas   sigmas   sigmas   23       noise
KDPM2Discrete                             sigmas   sigmas   sigmas   sigmas   sigmas   23       noise
KDPM2AncestralDiscrete                    sigmas   sigmas   sigmas   sigmas   sigmas   23       noise
LMSDiscrete                               sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
IPNDM                                     sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
LCM                                       sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
TCD                                       sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DDIM                                      sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DDIMInverse                               sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DDIMParallel                              sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DDPM                                      sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
DDPMParallel                              sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
CogVideoXDDIM                             sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
CogVideoXDPM                              sigmas   sigmas   sigmas   sigmas   sigmas   missing  noise
CMStochasticIterative                     sigmas   sigmas   sigmas   sigmas   sigmas   12       noise
EulerDiscrete +flow                       mu       mu       mu       mu       predicts predicts noise
PNDM                                      sigmas   sigmas   sigmas   sigmas   sigmas   21       noise
PNDM +no-prk                              sigmas   sigmas   sigmas   sigmas   sigmas   13       noise
SCM                                       sigmas   sigmas   sigmas   sigmas   sigmas   middle   middle
Piflow                                    distilled distilled distilled distilled distilled divisible noise
UnCLIP                                    sigmas   sigmas   sigmas   sigmas   sigmas   order    order
Helios                                    config   missing  missing  missing  missing  config   config
HeliosDMD                                 config   missing  missing  missing  missing  config   config
DDPMWuerstchen                            sigmas   sigmas   sigmas   sigmas   sigmas   order    order
ScoreSdeVe                                sigmas   sigmas   sigmas   sigmas   sigmas   step     noise
RePaint                                   sigmas   sigmas   sigmas   sigmas   sigmas   missing  noise
KarrasVe                                  sigmas   sigmas   sigmas   sigmas   sigmas   missing  noise
"""
"""For each scheduler, with its options, and each of `CASES`: the steps that it executes, or the pipeline's refusal."""

FRAMEPACK = {
    "FlowMatchEulerDiscrete": "12",
    "FlowMatchEulerDiscrete +dynamic": "12",
    "FlowMatchEulerDiscrete +stochastic": "12",
    "FlowMatchLCM": "12",
    "UniPCMultistep +flow": "12",
    "UniPCMultistep +flow +dynamic": "12",
    "DPMSolverMultistep +flow": "sigmas",
    "EulerDiscrete": "mu",
}
"""The same for FramePack, whose runs take long. It passes the scheduler's timesteps on as they are."""

TABLE_OF = "0.42"
"""The version of diffusers that the table was made with. Others may refuse more or less."""

RISING = {"DDIMInverse", "DPMSolverMultistepInverse"}
"""Their noise levels rise at each step, so that each step begins a new history and is computed."""

NOT_IN_TABLE = {
    "AmusedScheduler": "for discrete tokens",
    "BlockRefinementScheduler": "for discrete tokens",
    "DiscreteDDIMScheduler": "for discrete tokens",
    "EntropyBoundScheduler": "for discrete tokens",
    "VQDiffusionScheduler": "for discrete tokens",
    "RFD4ProteinaScheduler": "for proteins",
    "CosineDPMSolverMultistepScheduler": "needs torchsde",
    "DPMSolverSDEScheduler": "needs torchsde",
}

FEW_BLOCKS = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "hunyuan-video": {"num_layers": 1, "num_single_layers": 1},
    "sd3": {"num_layers": 2},
}

FAST = {
    ("FlowMatchEulerDiscrete +inverted", "qwen"),
    ("FlowMatchHeunDiscrete", "sd3"),
    ("FlowMatchLCM", "sd3 img2img cfg"),
    ("DPMSolverMultistep +flow", "sd3"),
    ("UniPCMultistep +flow", "hunyuan"),
    ("DPMSolverMultistep +flow", "qwen"),
}
"""The combinations that `pytest` alone tries."""


def table():
    """By scheduler and case, what the table says."""
    rows = {}
    for line in TABLE.strip().splitlines():
        *scheduler, cells = re.split(r"\s+(?=[^+\s]\S*(?:\s+\S+){6}$)", line.strip())
        rows[" ".join(scheduler)] = dict(zip(CASES, cells.split(), strict=True))
    cells = {(scheduler, case): cell for scheduler, cells in rows.items() for case, cell in cells.items()}
    return cells | {(scheduler, "hunyuan framepack"): cell for scheduler, cell in FRAMEPACK.items()}


EXPECTED = table()


def is_tried(scheduler, case):
    """Whether the combination says more than others do.

    A pipeline that refuses a scheduler with options as it does without them refuses it before the cache is asked. And
    the options of the family's own scheduler only change its noise levels: each is tried in half of the pipelines.
    """
    kind, *options = scheduler.split()
    if not options or case not in CASES or (scheduler, case) in FAST:
        return True
    expected = EXPECTED[scheduler, case]
    if expected in REFUSALS:
        return expected != EXPECTED.get((kind, case))
    return kind != "FlowMatchEulerDiscrete" or (SCHEDULERS.index(scheduler) + CASES.index(case)) % 2 == 0


SCHEDULERS = list(dict.fromkeys(scheduler for scheduler, _ in EXPECTED))


def class_of(scheduler):
    return scheduler.split()[0] + "Scheduler"


@pytest.fixture(scope="module")
def pipes():
    """`pipes(case)` -> its small pipeline, one for the whole file."""
    verbosity, made = diffusers.logging.get_verbosity(), {}
    diffusers.logging.set_verbosity_error()

    def pipe_of(case):
        if case not in made:
            family = next(family for family, (_, cases) in small.FAMILIES.items() if case in cases)
            made[case] = replace(small.ALL[case], transformer_options=FEW_BLOCKS.get(family, {})).build()
            small.ALL[case].run(made[case], steps=2)  # a first run adds what diffusers keeps on the transformer
        return made[case]

    yield pipe_of
    diffusers.logging.set_verbosity(verbosity)


@pytest.fixture
def pipe(pipes, case):
    pipe = pipes(case)
    scheduler, attributes = pipe.scheduler, dict(vars(pipe.transformer))
    yield pipe
    lesa.disable_cache(pipe)
    pipe.scheduler = scheduler
    assert vars(pipe.transformer) == attributes


def predictor():
    torch.manual_seed(0)
    return FusedKANPredictor(PredictorConfig(small.DIM, rank=2, hidden=4))


@contextmanager
def counted(pipe):
    """Gives a list for each block, which gets an item when the block runs."""
    blocks = [*pipe.transformer.transformer_blocks, *getattr(pipe.transformer, "single_transformer_blocks", ())]
    runs = [[] for _ in blocks]
    handles = [block.register_forward_pre_hook(lambda *_, r=r: r.append(1)) for block, r in zip(blocks, runs)]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def attempt(pipe, case):
    """The latents and None, or None and the error."""
    try:
        return small.ALL[case].latents(pipe, steps=STEPS), None
    except Exception as error:  # of any kind: diffusers raises AttributeError, KeyError, ValueError, ...
        return None, error


@pytest.mark.parametrize(
    "scheduler, case",
    [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow]) for pair in EXPECTED if is_tried(*pair)],
)
def test_a_scheduler_is_exact_or_refused_by_the_pipeline(pipe, scheduler, case):
    kind = getattr(diffusers, class_of(scheduler), None)
    if kind is None:
        pytest.skip(f"this version of diffusers has no {class_of(scheduler)}")
    options = {name: value for option in scheduler.split()[1:] for name, value in OPTIONS[option[1:]].items()}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    streams, expected = small.ALL[case].streams, EXPECTED[scheduler, case]
    with counted(pipe) as runs:
        plain, refusal = attempt(pipe, case)
    total = len(runs[0]) // len(streams)
    if diffusers.__version__.startswith(TABLE_OF):
        assert expected == str(total) if refusal is None else re.search(REFUSALS[expected], str(refusal.args[0]))

    if refusal is not None:
        if runs[0]:  # the transformer was called before: it is the same refusal with the cache on
            with lesa.enable_cache(pipe, predictor(), SOME):
                _, cached = attempt(pipe, case)
            assert (type(cached), str(cached)) == (type(refusal), str(refusal))
        return

    with lesa.enable_cache(pipe, predictor(), range(total), strict=True) as handle, counted(pipe) as runs:
        everything = small.ALL[case].latents(pipe, steps=STEPS)
    assert torch.equal(everything, plain) and plain.isfinite().all()
    assert [len(r) for r in runs] == [total * len(streams)] * len(runs)
    assert {name: s.computed for name, s in handle.stats.streams.items()} == dict.fromkeys(streams, [*range(total)])

    is_rising = scheduler in RISING
    with (
        lesa.enable_cache(pipe, predictor(), SOME, strict=True) as handle,
        counted(pipe) as runs,
    ):
        cached = small.ALL[case].latents(pipe, steps=STEPS)
    computed = [*range(total)] if is_rising else SOME
    assert [len(r) for r in runs] == [len(computed) * len(streams)] * len(runs)
    rest = [step for step in range(total) if step not in computed]
    assert {name: (s.computed, s.predicted) for name, s in handle.stats.streams.items()} == dict.fromkeys(
        streams, (computed, rest)
    )
    assert handle.stats.unlocated == 0 and handle.stats.runs == 1
    assert cached.isfinite().all() and torch.equal(cached, plain) == is_rising

    assert torch.equal(small.ALL[case].latents(pipe, steps=STEPS), plain)


def test_every_scheduler_of_diffusers_is_in_the_table():
    classes = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert classes - {class_of(scheduler) for scheduler, _ in EXPECTED} <= set(NOT_IN_TABLE)
    assert {case for _, case in EXPECTED} == {*CASES, "hunyuan framepack"} and len(EXPECTED) == 80 * len(CASES) + len(
        FRAMEPACK
    )


@pytest.mark.parametrize("case", CASES)
def test_the_schedulers_that_diffusers_calls_compatible_are_in_the_table(pipe, case):
    compatible = {kind.__name__ for kind in pipe.scheduler.compatibles}
    assert compatible and compatible <= {class_of(scheduler) for scheduler, _ in EXPECTED}


def test_each_family_is_in_the_table():
    assert {family for family, (_, cases) in small.FAMILIES.items() if {*cases} & {*CASES}} == set(small.FAMILIES)
