import functools
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from lesa_kernels.extension import extension, extension_error
from lesa_kernels.predictor import extension as extension_module
from lesa_kernels.predictor.arguments import NewtonExperts, RingState, Shape
from lesa_kernels.predictor.extension import newton_coefficients_extension, newton_predict_extension
from lesa_kernels.predictor.ops.coefficients import newton_coefficients
from lesa_kernels.predictor.reference import newton_coefficients_ref, newton_predict_ref
from lesa_kernels.stream.arguments import Weights

pytestmark = pytest.mark.skipif(extension_error() is not None, reason=f"no extension: {extension_error()}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = math.nan, math.inf


def case(
    seed=0,
    dtype=torch.float32,
    capacity=4,
    count=(4,),
    tokens=5,
    dim=19,
    sigma=0.3,
    history=(4,),
    bounds=(),
    hidden=7,
    rank=0,
    grid_size=8,
    spline_order=3,
):
    """The arguments of `newton_predict`, none of them zero, as a namespace; memory that holds no anchor is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=0.5):
        return torch.randn(shape, generator=generator) * scale

    batch, stages, taps = len(count), len(history), max(history) - 1
    storage = torch.full((capacity, batch, tokens, dim), NAN)
    sigmas = torch.full((capacity, batch), NAN)
    cursor = torch.randint(capacity, (batch,), generator=generator)
    for row, anchors in enumerate(count):
        level = torch.rand((), generator=generator) * 0.2 + 0.35
        for age in range(anchors):  # from the newest to the oldest, so sigma rises
            slot = (int(cursor[row]) - 1 - age) % capacity
            sigmas[slot, row], storage[slot, row] = level, randn(tokens, dim, scale=1)
            level = level + 0.03 + 0.1 * torch.rand((), generator=generator)
    residual = [None] * 3
    if rank:
        residual = [randn(stages, rank, taps, dim, scale=0.2), randn(stages, dim, rank), randn(stages, dim)]
    return SimpleNamespace(
        storage=storage.to(dtype),
        scales=None,
        sigmas=sigmas,
        cursor=cursor.int(),
        count=torch.tensor(count, dtype=torch.int32),
        sigma=torch.tensor(sigma).expand(batch).clone(),
        in_weight=randn(stages, hidden, taps + 2),
        in_bias=randn(stages, hidden),
        spline=randn(stages, hidden, grid_size + spline_order),
        out_weight=randn(stages, taps, dim, hidden),
        out_bias=randn(stages, taps, dim),
        down=residual[0],
        up=residual[1],
        up_bias=residual[2],
        stage_bounds=bounds,
        history_length=history,
        grid_size=grid_size,
        spline_order=spline_order,
    )


def in_tuples(arguments):
    return [kind(*(getattr(arguments, name) for name in kind._fields)) for kind in (RingState, NewtonExperts, Shape)]


def predict(arguments):
    return newton_predict_extension(*in_tuples(arguments))


def predict_ref(arguments, dtype=None):
    ring, experts, shape = in_tuples(arguments)
    return newton_predict_ref(ring if dtype is None else ring._replace(storage=ring.storage.to(dtype)), experts, shape)


def assert_accurate(arguments):
    """At most twice the error of plain torch in the same dtype, up to the rounding of the last operation."""
    exact, plain, actual = predict_ref(arguments, torch.float64), predict_ref(arguments), predict(arguments)
    assert actual.dtype == arguments.storage.dtype and actual.shape == exact.shape and actual.is_contiguous()
    assert torch.equal(actual.isnan(), exact.isnan())
    exact = exact.nan_to_num()
    scale = exact.abs().max() if exact.numel() else 0.0
    error, bound = ((t.nan_to_num().double() - exact).abs().amax((1, 2)) for t in (actual, plain))
    assert (error <= 2 * bound + 2 * torch.finfo(torch.float32).eps * scale).all(), f"{error} against {bound}"


def relaid(tensor, layout):
    """The same values with other strides."""
    if layout == "sliced":
        padded = tensor.new_full([n + 1 for n in tensor.shape], NAN if tensor.is_floating_point() else -1)
        view = padded[tuple(slice(1, None) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "batch first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "tokens first":
        return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return tensor


@pytest.fixture(params=["avx512", "avx2", "plain"])
def instructions(request, monkeypatch):
    """Forecasts with no wider instructions than these. A processor without the widest uses what it has."""
    names = ("newton_predict", "newton_coefficients")
    limited = {name: functools.partial(getattr(extension(), name), instructions=request.param) for name in names}
    monkeypatch.setattr(extension_module, "extension", lambda: SimpleNamespace(**limited))
    return request.param


@pytest.mark.parametrize("rank", [0, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_of_instructions_are_as_accurate(instructions, dtype, rank, seed):
    assert_accurate(case(seed=seed, dtype=dtype, rank=rank, dim=[1, 7, 50, 129][seed], tokens=[3, 1, 40, 25][seed]))


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_are_as_accurate_as_plain_torch(seed):
    pick = random.Random(seed)
    capacity, batch, stages = pick.randint(1, 9), pick.randint(1, 4), pick.randint(1, 3)
    arguments = case(
        seed,
        DTYPES[seed % 3],
        capacity,
        tuple(pick.randint(0, capacity) for _ in range(batch)),
        pick.choice([1, 2, 5, 6, 7, 13, 31]),
        pick.choice([1, 3, 8, 15, 16, 33, 64, 65, 100, 131, 530]),
        history=tuple(pick.randint(1, capacity) for _ in range(stages)),
        bounds=(0.31, 0.12)[: stages - 1],
        hidden=pick.choice([1, 7, 16, 40, 64]),
        rank=pick.choice([0, 0, 1, 5, 32, 33]),
        grid_size=pick.randint(1, 9),
        spline_order=pick.randint(1, 6),
    )
    arguments.sigma = torch.tensor([pick.choice([0.32, 0.31, 0.3, 0.12, 0.05]) for _ in range(batch)])
    arguments.storage = relaid(arguments.storage, pick.choice(["dense", "sliced", "batch first", "tokens first"]))
    assert_accurate(arguments)


@pytest.mark.parametrize("rank", [0, 1, 5, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_anchors(dtype, rank):
    assert_accurate(case(1, dtype, 9, tuple(range(10)), 7, 45, history=(9,), rank=rank))


@pytest.mark.parametrize("rank", [0, 5])
def test_mixed_stages_with_their_own_histories(rank):
    arguments = case(2, count=(9, 9, 9, 2, 9), capacity=9, history=(1, 3, 8), bounds=(0.31, 0.12), rank=rank)
    arguments.sigma = torch.tensor([0.32, 0.31, 0.12, 0.1, 0.25])  # a bound belongs to the stage below it
    assert_accurate(arguments)


def test_experts_in_other_dtypes_and_layouts_and_sigma_in_float64():
    arguments = case(3, count=(4, 4), rank=5)
    arguments.sigma = arguments.sigma.double()
    for name in ("in_weight", "in_bias", "spline", "out_weight", "out_bias", "down", "up", "up_bias"):
        value = relaid(getattr(arguments, name), "sliced")
        setattr(arguments, name, value.to(torch.bfloat16 if name < "p" else torch.float64))
    for name in ("sigmas", "cursor", "count", "sigma"):
        setattr(arguments, name, relaid(getattr(arguments, name), "sliced"))
    assert_accurate(arguments)


def test_tokens_may_share_memory():
    arguments = case(4)
    arguments.storage = arguments.storage[:, :, :1].expand(4, 1, 5, 19)
    assert arguments.storage.stride(2) == 0
    assert_accurate(arguments)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=["no tokens", "no channels"])
@pytest.mark.parametrize("rank", [0, 5])
def test_nothing_to_forecast(rank, shape):
    tokens, dim = shape
    assert predict(case(tokens=tokens, dim=dim, rank=rank)).shape == (1, tokens, dim)


def test_no_sample():
    arguments = case(rank=5)
    for name in ("storage", "sigmas"):
        setattr(arguments, name, getattr(arguments, name)[:, :0])
    for name in ("cursor", "count", "sigma"):
        setattr(arguments, name, getattr(arguments, name)[:0])
    assert predict(arguments).shape == (0, 5, 19)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_that_are_not_finite_spread_as_in_plain_torch(dtype, value, rank):
    arguments = case(5, dtype, count=(4, 3, 4), rank=rank)
    slot = (arguments.cursor - 1).long() % 4
    arguments.storage[slot[0], 0, 2, 3] = value
    arguments.storage[slot[1] - 1, 1, 4, 18] = value  # an older anchor, in the last channel
    actual, expected = predict(arguments), predict_ref(arguments)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert actual[2].isfinite().all()
    assert int((~actual[:2].isfinite()).sum()) == (2 * 19 if rank else 2)


@pytest.mark.parametrize(
    ("name", "value", "rank"),
    [
        *itertools.product(("sigma", "in_weight", "in_bias", "spline", "out_weight", "out_bias"), (NAN, INF), (0, 5)),
        *itertools.product(("down", "up", "up_bias"), (NAN, INF), (5,)),
        *itertools.product(("sigmas",), (NAN, 0.36), (0, 5)),  # equal levels: a divided difference over zero
    ],
)
def test_other_values_that_are_not_finite_spread_as_in_plain_torch(name, value, rank):
    arguments = case(6, count=(4, 3, 2), rank=rank)
    changed = getattr(arguments, name).view(-1)
    changed[slice(None) if name == "sigmas" else -1] = value
    actual, expected = predict(arguments), predict_ref(arguments)
    assert torch.equal(actual.isfinite(), expected.isfinite())


def test_a_rounding_to_16_bits_is_torchs_own():
    values = torch.randint(-(2**31), 2**31, (64, 71), generator=torch.Generator().manual_seed(0))
    values = values.to(torch.int32).view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        # With a newest feature of zero and no other, the forecast is the residual's bias.
        arguments = case(dtype=dtype, capacity=1, count=(1,), tokens=1, dim=71, history=(1,), rank=1)
        arguments.storage.zero_()
        arguments.up.zero_()
        for bias in values:
            arguments.up_bias = bias.view(1, 71)
            actual, expected = predict(arguments)[0, 0], bias.to(dtype)
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bytes(dtype, rank):
    arguments = case(7, dtype, count=(4, 0, 2), tokens=230, dim=1031, rank=rank, hidden=64)
    threads = torch.get_num_threads()
    forecasts = []
    try:
        for n in range(1, 6):
            torch.set_num_threads(n)
            forecasts.append(predict(arguments).view(torch.int32 if dtype == torch.float32 else torch.int16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(forecast, forecasts[0]) for forecast in forecasts)


PARAMETERS = NewtonExperts._fields
SIZES = ("dim", "hidden", "rank", "grid_size", "spline_order")


def raw_predict(**changes):
    """Calls the compiled function as `newton_predict_extension` does, with `changes`, on 2 samples of 3 x 5."""
    arguments = case(8, count=(4, 2), tokens=3, dim=5, rank=2, history=(4, 3), bounds=(0.2,))
    for name in ("cursor", "count"):
        if (value := changes.pop(f"{name}_value", None)) is not None:
            getattr(arguments, name).fill_(value)
    output, changed = torch.zeros(2, 3, 5), bool(changes)
    tensors = {name: getattr(arguments, name) for name in ("storage", "sigmas", "cursor", "count", "sigma")}
    call = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = dict(dim=5, hidden=7, rank=2, grid_size=8, spline_order=3)
    call |= dict(
        parameters=[changes.pop(name, getattr(arguments, name).data_ptr()) for name in PARAMETERS],
        sizes=[changes.pop(name, sizes[name]) for name in SIZES],
    )
    call |= dict(storage_dtype="float32", storage_sizes=(4, 2, 3), storage_strides=(30, 15, 5))
    call |= dict(stage_bounds=(0.2,), history_length=(4, 3), output=output.data_ptr(), threads=1)
    try:
        extension().newton_predict(**call | changes)
    finally:
        if changed:
            assert not output.any()
    return output, arguments


BAD_CALLS = {
    **{
        f"null {name}": ({name: 0}, f"`{name}` must not be a null pointer, but got 0")
        for name in ("storage", "sigmas", "cursor", "count", "sigma", "in_weight", "in_bias", "spline", "out_weight")
    },
    **{
        f"null {name}": ({name: 0}, f"`{name}` must not be a null pointer, but got 0")
        for name in ("out_bias", "down", "up", "up_bias", "output")
    },
    "negative size": (dict(storage_sizes=(4, 2, -3)), "`tokens` must be at least 0, but got -3"),
    "no slot": (dict(storage_sizes=(0, 2, 3)), "`capacity` must be at least 1, but got 0"),
    "negative stride": (dict(storage_strides=(30, -15, 5)), "`storage_strides` must be at least 0, but got -15"),
    "unknown instructions": (dict(instructions="mmx"), "`instructions` must be one of avx512, avx2, plain"),
    "negative hidden": (dict(hidden=-1), "`hidden` must be at least 0, but got -1"),
    "negative rank": (dict(rank=-1), "`rank` must be at least 0, but got -1"),
    "no grid": (dict(grid_size=0), "`grid_size` must be at least 1, but got 0"),
    "negative order": (dict(spline_order=-1), "`spline_order` must be at least 0, but got -1"),
    "huge order": (dict(spline_order=2**63 - 1), r"`spline` must address at most 2\^63 - 1 bytes"),
    "huge output": (
        dict(storage_sizes=(4, 2, 2**31), dim=2**31),
        r"`out(put|_weight|_bias)` must address at most 2\^63",
    ),
    "huge stride": (dict(storage_strides=(2**62, 15, 5)), r"`storage` must address at most 2\^63 - 1 bytes"),
    "huge hidden": (dict(hidden=2**62), r"`hidden` must address at most 2\^63 - 1 bytes"),
    "huge rank": (dict(rank=2**62), r"`down` must address at most 2\^63 - 1 bytes"),
    "unknown dtype": (dict(storage_dtype="float64"), "`storage_dtype` must be one of float32, float16, bfloat16"),
    "no thread": (dict(threads=0), "`threads` must be at least 1, but got 0"),
    "too many stages": (dict(stage_bounds=(0.2, 0.1)), "`history_length` must have one entry more than `stage_bounds`"),
    "no stage": (dict(stage_bounds=(), history_length=()), "`history_length` must have one entry more"),
    "no history": (dict(history_length=(4, 0)), "`history_length` must be at least 1, but got 0"),
    "long history": (dict(history_length=(5, 3)), "`history_length` must be at most the ring's capacity of 4"),
    "broken cursor": (dict(cursor_value=4), "`cursor and count` must lie within the ring's capacity of 4, but got 4"),
    "negative cursor": (dict(cursor_value=-1), "`cursor and count` must lie within the ring's capacity of 4"),
    "broken count": (dict(count_value=5), "`cursor and count` must lie within the ring's capacity of 4"),
    "negative count": (dict(count_value=-1), "`cursor and count` must lie within the ring's capacity of 4"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_the_compiled_function_checks_before_it_reads(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        raw_predict(**dict(changes))


def test_the_compiled_function_takes_what_it_should():
    output, arguments = raw_predict()
    torch.testing.assert_close(output, predict_ref(arguments))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("width", [1, 16, 45, 530])
def test_weights_of_several_steps(instructions, width, rank):
    """In one call; with stages and counts of their own, they are those of plain torch."""
    arguments = case(9, capacity=9, count=(9,), dim=width, history=(2, 4, 7), bounds=(0.4, 0.2), rank=rank, hidden=33)
    _, experts, shape = in_tuples(arguments)
    steps, batch = 5, 3
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.rand(steps, batch, 7, generator=generator).cumsum(-1) + 0.4
    count = torch.randint(0, 10, (steps, batch), generator=generator).int()
    sigma = torch.rand(steps, batch, generator=generator) * 0.6
    exact = newton_coefficients_ref(sigmas, count, sigma, experts, shape, torch.float64)
    plain = newton_coefficients_ref(sigmas, count, sigma, experts, shape)
    actual = newton_coefficients_extension(sigmas, count, sigma, experts, shape)
    for name, mine, theirs, right in zip(Weights._fields, actual, plain, exact):
        assert (mine is None) == (right is None) == (name in ("taps", "stage", "constant") and not rank), name
        if mine is not None:
            assert mine.dtype == (torch.int32 if name in ("count", "stage") else torch.float32) and mine.is_contiguous()
            error, bound = (float((each.double() - right).abs().max()) for each in (mine, theirs))
            assert error <= 2 * bound + 2 * torch.finfo(torch.float32).eps * float(right.abs().max()), name


def test_the_public_weights_are_those_of_the_extension_without_gradients_only(monkeypatch):
    arguments, calls = case(10, rank=5), []
    _, experts, shape = in_tuples(arguments)
    levels = (torch.tensor([[[0.5, 0.6, 0.7, 0.8]]]), torch.tensor([[4]], dtype=torch.int32), torch.tensor([[0.4]]))

    def called(*given):
        calls.append(given)
        return newton_coefficients_extension(*given)

    monkeypatch.setattr(extension_module, "newton_coefficients_extension", called)
    expected = newton_coefficients(*levels, *experts, *shape, backend="torch")
    for each, right in zip(newton_coefficients(*levels, *experts, *shape), expected):
        torch.testing.assert_close(each, right)
    assert len(calls) == 1
    learned = experts._replace(out_bias=experts.out_bias.clone().requires_grad_())
    assert newton_coefficients(*levels, *learned, *shape).anchors.requires_grad and len(calls) == 1
    operator = torch.ops.lesa_kernels.newton_coefficients_cpu.default
    torch.library.opcheck(operator, (*levels, *experts, *shape))


def test_the_compiled_weights_are_checked_before_anything_is_read():
    _, experts, shape = in_tuples(case(11))
    levels = torch.rand(1, 1, 4).cumsum(-1), torch.full((1, 1), -1, dtype=torch.int32), torch.rand(1, 1)
    with pytest.raises(ValueError, match="`count` must be at least 0, but got -1"):
        newton_coefficients_extension(*levels, experts, shape)
    addresses = [0 if part is None else part.data_ptr() for part in experts]
    made = torch.zeros(1, 4, 19), torch.zeros(1, dtype=torch.int32)
    call = [levels[0].data_ptr(), made[1].data_ptr(), levels[2].data_ptr(), 1, addresses, [19, 7, 0, 8, 3], (), (4,)]
    call += [made[0].data_ptr(), made[1].data_ptr(), 0, 0, 0, 1]
    extension().newton_coefficients(*call)
    wrong = [(0, 0, "sigmas"), (1, 0, "count"), (2, 0, "sigma"), (3, -1, "forecasts"), (4, [0] * 8, "in_weight")]
    wrong += [(5, [19, 7, 1, 8, 3], "down"), (7, (4, 3), "history_length"), (8, 0, "anchors"), (9, 0, "anchor_count")]
    wrong += [(4, [*addresses[:7], addresses[0]], "constant"), (13, 0, "threads")]
    for place, value, name in wrong:
        with pytest.raises(ValueError, match=f"`{name}` must"):
            extension().newton_coefficients(*call[:place], value, *call[place + 1 :])
