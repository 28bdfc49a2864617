import functools
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from lesa_kernels.extension import extension, extension_error
from lesa_kernels.stream import LowRank, OutputHead, StoredFeatures, Weights, stream_forecast, stream_velocity
from lesa_kernels.stream import extension as extension_module
from lesa_kernels.stream.extension import stream_forecast_extension, stream_velocity_extension
from lesa_kernels.stream.op import check_stream
from lesa_kernels.stream.reference import output_head_ref, stream_forecast_ref, stream_velocity_ref

pytestmark = pytest.mark.skipif(extension_error() is not None, reason=f"no extension: {extension_error()}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = math.nan, math.inf


def case(
    seed=0,
    dtype=torch.float32,
    count=(4,),
    read=None,
    tokens=5,
    dim=19,
    history=4,
    stages=2,
    rank=0,
    anchors="per channel",
    constant="per channel",
    sums=0.0,
):
    """A ring with `count` features, of which `read` are read, and weights; other memory of the ring is NaN.

    The weights of each tap add up to `sums` without any rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=0.5):
        return torch.randn(shape, generator=generator) * scale

    batch, capacity = len(count), max(history, *count)
    storage = torch.full((capacity, batch, tokens, dim), NAN)
    cursor = torch.randint(capacity, (batch,), generator=generator)
    for row, there in enumerate(count):
        for age in range(there):
            storage[(int(cursor[row]) - 1 - age) % capacity, row] = randn(tokens, dim, scale=1)
    features = StoredFeatures(storage.to(dtype), None, cursor.int(), torch.tensor(count, dtype=torch.int32))
    taps = (randn(batch, history - 1, history, scale=64)).round() / 64
    taps[:, :, 0] += sums - taps.tril(1).sum(2)  # the other weights of a tap are not used
    weights = Weights(
        anchors=randn(batch, history, dim) if anchors == "per channel" else randn(batch, history),
        count=torch.tensor(count if read is None else read, dtype=torch.int32),
        constant={"per channel": randn(batch, dim), "scalar": randn(batch), None: None}[constant],
        taps=taps if rank else None,
        stage=torch.randint(stages, (batch,), generator=generator).int() if rank else None,
    )
    maps = (randn(stages, rank, history - 1, dim), randn(stages, dim, rank)) if rank else (None, None)
    return features, weights, LowRank(*(None if part is None else part.to(dtype) for part in maps))


def forecast(features, weights, low_rank):
    check_stream(features, weights, low_rank)
    return stream_forecast_extension(features, weights, low_rank)


def assert_accurate(features, weights, low_rank):
    """At most twice the error of plain torch in the same dtype, up to the rounding of the last operation."""
    wide = features._replace(storage=features.storage.double())
    exact, plain = stream_forecast_ref(wide, weights, low_rank), stream_forecast_ref(features, weights, low_rank)
    actual = forecast(features, weights, low_rank)
    assert actual.dtype == features.storage.dtype and actual.shape == exact.shape and actual.is_contiguous()
    assert torch.equal(actual.isnan(), exact.isnan())
    exact = exact.nan_to_num()
    scale = exact.abs().max() if exact.numel() else 0.0
    error, bound = ((t.nan_to_num().double() - exact).abs().amax((1, 2)) for t in (actual, plain))
    assert (error <= 2 * bound + 2 * torch.finfo(torch.float32).eps * scale).all(), f"{error} against {bound}"


def relaid(tensor, layout):
    """The same values with other strides; the last dimension stays contiguous."""
    if layout == "sliced":
        padded = tensor.new_full([n + 1 for n in tensor.shape], NAN if tensor.is_floating_point() else -1)
        return padded[tuple(slice(1, None) for _ in tensor.shape)].copy_(tensor)
    if layout == "batch first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "tokens first":
        return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return tensor


@pytest.fixture(params=["avx512", "avx2", "plain"])
def instructions(request, monkeypatch):
    """Forecasts with no wider instructions than these. A processor without the widest uses what it has."""
    limited = {
        name: functools.partial(getattr(extension(), name), instructions=request.param)
        for name in ("stream_forecast", "stream_velocity")
    }
    monkeypatch.setattr(extension_module, "extension", lambda: SimpleNamespace(**limited))
    return request.param


@pytest.mark.parametrize("rank", [0, 5, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_of_instructions_are_as_accurate(instructions, dtype, rank, seed):
    sizes = dict(dim=[1, 32, 50, 129][seed], tokens=[3, 1, 40, 27][seed])
    anchors, constant = [("per channel", "scalar"), ("scalar", None), ("scalar", "per channel")][seed % 3]
    arguments = case(seed, dtype, rank=rank, anchors=anchors, constant=constant, sums=seed % 2, **sizes)
    assert_accurate(*arguments)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_are_as_accurate_as_plain_torch(seed):
    pick = random.Random(seed)
    batch, history = pick.randint(1, 4), pick.randint(1, 9)
    count = tuple(pick.randint(0, 9) for _ in range(batch))
    features, weights, low_rank = case(
        seed,
        DTYPES[seed % 3],
        count,
        tuple(pick.choice([0, n, n, min(n, 2), n + 1]) for n in count),
        pick.choice([1, 2, 5, 6, 7, 13, 31]),
        pick.choice([1, 3, 8, 15, 16, 33, 64, 65, 100, 131, 530]),
        history,
        pick.randint(1, 3),
        pick.choice([0, 0, 1, 5, 32, 33]),
        pick.choice(["per channel", "scalar"]),
        pick.choice(["per channel", "scalar", None]),
        pick.choice([0.0, 0.0, 1.0]),
    )
    storage = relaid(features.storage, pick.choice(["dense", "sliced", "batch first", "tokens first"]))
    assert_accurate(features._replace(storage=storage), weights, low_rank)


@pytest.mark.parametrize("rank", [0, 1, 32])
@pytest.mark.parametrize("anchors", ["scalar", "per channel"])
def test_every_number_of_anchors(rank, anchors):
    assert_accurate(*case(1, count=(16,) * 17, read=tuple(range(17)), dim=45, history=16, rank=rank, anchors=anchors))


def test_a_tap_that_is_a_difference_but_for_rounding_is_as_accurate_as_one_that_is():
    """Its weights are large, and so would be the error of products with features that are far from zero."""
    features, weights, low_rank = case(2, dim=200, rank=5)
    features.storage.add_(100.0)
    taps = weights.taps.double() * 1.1
    exact = stream_forecast_ref(
        features._replace(storage=features.storage.double()), weights._replace(taps=taps), low_rank
    )
    actual, plain = (
        f(features, weights._replace(taps=taps.float()), low_rank) for f in (forecast, stream_forecast_ref)
    )
    assert (actual - exact).abs().max() < (plain - exact).abs().max()


def test_samples_may_share_weights_and_tokens_memory():
    features, weights, low_rank = case(3, count=(4, 4, 4), rank=5)
    shared = Weights(*(part[:1].expand(3, *part.shape[1:]) for part in weights))
    assert shared.anchors.stride(0) == 0
    assert_accurate(features._replace(storage=features.storage[:, :, :1].expand(4, 3, 5, 19)), shared, low_rank)


def test_other_layouts_and_dtypes():
    features, weights, low_rank = case(4, count=(4, 2, 3), rank=5)
    weights = Weights(*(relaid(part if part.dtype == torch.int32 else part.double(), "sliced") for part in weights))
    features = features._replace(cursor=relaid(features.cursor, "sliced"), count=relaid(features.count, "sliced"))
    for down, up in itertools.product(("float64", "float16"), repeat=2):
        maps = LowRank(low_rank.down.to(getattr(torch, down)), relaid(low_rank.up.to(getattr(torch, up)), "sliced"))
        assert_accurate(features, weights, maps)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=["no tokens", "no channels"])
@pytest.mark.parametrize("rank", [0, 5])
def test_nothing_to_forecast(rank, sizes):
    tokens, dim = sizes
    assert forecast(*case(tokens=tokens, dim=dim, rank=rank)).shape == (1, tokens, dim)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_that_are_not_finite_spread_as_in_plain_torch(dtype, value, rank):
    features, weights, low_rank = case(5, dtype, count=(4, 3, 4), rank=rank)
    slot = (features.cursor - 1).long() % 4
    features.storage[slot[0], 0, 2, 3] = value
    features.storage[slot[1] - 1, 1, 4, 18] = value
    actual, expected = forecast(features, weights, low_rank), stream_forecast_ref(features, weights, low_rank)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    assert int((~actual.isfinite()).sum()) == (2 * 19 if rank else 2)


@pytest.mark.parametrize("rank", [0, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bytes(dtype, rank):
    arguments = case(6, dtype, count=(4, 0, 2), tokens=230, dim=1031, rank=rank)
    threads, forecasts = torch.get_num_threads(), []
    try:
        for n in range(1, 5):
            torch.set_num_threads(n)
            forecasts.append(forecast(*arguments).view(torch.int32 if dtype == torch.float32 else torch.int16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, forecasts[0]) for each in forecasts)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_stores_give_the_same_bytes(monkeypatch, instructions, dtype, rank, offset):
    """The stores of a large output are streamed where its lines are aligned; those of a small one never are."""
    features, *others = case(10, dtype, count=(3, 2), tokens=1010, dim=1056, history=3, rank=rank)
    small = [
        forecast(features._replace(storage=features.storage[:, :, first : first + 400]), *others)
        for first in range(0, 1010, 400)
    ]
    expected = torch.cat(small, 1)
    assert small[0].nbytes < 2**22 <= expected.nbytes
    assert expected.isfinite().all()
    buffer = torch.full((expected.numel() + 1,), NAN, dtype=dtype)
    assert buffer.data_ptr() % 64 == 0
    output = buffer[offset:][: expected.numel()].view(expected.shape)
    limited = extension_module.extension()

    def into_the_buffer(*call):
        *inputs, _, threads = call
        limited.stream_forecast(*inputs, output.data_ptr(), threads)

    monkeypatch.setattr(extension_module, "extension", lambda: SimpleNamespace(stream_forecast=into_the_buffer))
    forecast(features, *others)
    assert torch.equal(output, expected)
    assert buffer[0 if offset else -1].isnan()


def test_the_public_function_takes_it_without_gradients_only(monkeypatch):
    features, weights, low_rank = case(7, rank=5)
    calls = []
    monkeypatch.setattr("lesa_kernels.stream.op.stream_forecast_extension", lambda *a: calls.append(a) or forecast(*a))
    expected = stream_forecast(features, weights, low_rank, backend="torch")
    torch.testing.assert_close(stream_forecast(features, weights, low_rank), expected)
    assert len(calls) == 1
    learned = low_rank._replace(up=low_rank.up.requires_grad_())
    assert stream_forecast(features, weights, learned).requires_grad and len(calls) == 1
    with pytest.raises(RuntimeError, match="`backend` must be one that stream_forecast has"):
        stream_forecast(features, weights, learned, backend="extension")
    with torch.no_grad():
        stream_forecast(features, weights, learned)
    assert len(calls) == 2


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("backend", ["extension", "torch"])
def test_a_negative_number_of_anchors_is_none(backend, rank):
    features, weights, low_rank = case(17, count=(4, 4, 4), read=(-1, 4, -(2**31)), rank=rank)
    actual = stream_forecast(features, weights, low_rank, backend=backend)
    assert actual[[0, 2]].isnan().all() and actual[1].isfinite().all()


def test_the_operator_passes_torchs_checks():
    torch.library.opcheck(torch.ops.lesa_kernels.stream_forecast_cpu.default, tuple(itertools.chain(*case(8, rank=5))))


def raw_forecast(**changes):
    """Calls the compiled function as `stream_forecast_extension` does, with `changes`, on 2 samples of 3 x 5."""
    features, weights, low_rank = case(9, count=(4, 2), tokens=3, dim=5, rank=2)
    for name, tensor in dict(cursor=features.cursor, count=features.count, stage=weights.stage).items():
        if (value := changes.pop(f"{name}_value", None)) is not None:
            tensor.fill_(value)
    output, changed = torch.zeros(2, 3, 5), bool(changes)
    named = dict(zip(Weights._fields, weights))
    call = dict(storage=features.storage.data_ptr(), storage_dtype="float32", storage_sizes=(4, 2, 3, 5))
    call |= dict(storage_strides=(30, 15, 5), cursor=features.cursor.data_ptr(), count=features.count.data_ptr())
    call |= dict(
        history=4,
        weights=[changes.pop(name, part.data_ptr()) for name, part in named.items() if name != "count"],
        weights_strides=[changes.pop(f"{name}_stride", part.stride(0)) for name, part in named.items()],
    )
    call["weights"].insert(1, changes.pop("read", weights.count.data_ptr()))
    call |= dict(anchors_per_channel=True, constant_per_channel=True, stages=2, rank=2)
    call |= dict(down=low_rank.down.data_ptr(), up=low_rank.up.data_ptr(), residual_dtype="float32")
    call |= dict(output=output.data_ptr(), threads=1)
    try:
        extension().stream_forecast(**call | changes)
    finally:
        if changed:
            assert not output.any()
    return output, (features, weights, low_rank)


BAD_CALLS = {
    **{
        f"null {name}": ({name: 0}, f"`{name.replace('read', 'anchor_count')}` must not be a null pointer, but got 0")
        for name in ("storage", "cursor", "count", "anchors", "read", "taps", "stage", "down", "up", "output")
    },
    "negative size": (dict(storage_sizes=(4, 2, -3, 5)), "`tokens` must be at least 0, but got -3"),
    "no slot": (dict(storage_sizes=(0, 2, 3, 5)), "`capacity` must be at least 1, but got 0"),
    "negative stride": (dict(storage_strides=(30, -15, 5)), "`storage_strides` must be at least 0, but got -15"),
    "negative weights' stride": (dict(anchors_stride=-1), "`anchors` must be at least 0, but got -1"),
    "unknown instructions": (dict(instructions="mmx"), "`instructions` must be one of avx512, avx2, plain"),
    "negative rank": (dict(rank=-1), "`rank` must be at least 0, but got -1"),
    "huge rank": (dict(rank=2**62), r"`down` must address at most 2\^63 - 1 bytes"),
    "huge output": (dict(storage_sizes=(4, 2, 2**31, 2**31)), r"`(output|down|up)` must address at most 2\^63"),
    "huge stride": (dict(storage_strides=(2**62, 15, 5)), r"`storage` must address at most 2\^63 - 1 bytes"),
    "huge weights' stride": (dict(taps_stride=2**62), r"`taps` must address at most 2\^63 - 1 bytes"),
    "unknown dtype": (dict(storage_dtype="float64"), "`storage_dtype` must be one of float32, float16, bfloat16"),
    "unknown residual": (dict(residual_dtype="float64"), "`residual_dtype` must be one of float32, float16, bfloat16"),
    "no thread": (dict(threads=0), "`threads` must be at least 1, but got 0"),
    "no history": (dict(history=0), "`history` must be at least 1, but got 0"),
    "long history": (dict(history=5), "`history` must be at most the ring's capacity of 4, but got 5"),
    "broken cursor": (dict(cursor_value=4), "`cursor and count` must lie within the ring's capacity of 4, but got 4"),
    "negative count": (dict(count_value=-1), "`cursor and count` must lie within the ring's capacity of 4"),
    "unknown stage": (dict(stage_value=2), r"`stage` must lie in \[0, 2\), but got 2"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_the_compiled_function_checks_before_it_reads(name):
    changes, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        raw_forecast(**dict(changes))


def test_the_compiled_function_takes_what_it_should():
    output, arguments = raw_forecast()
    torch.testing.assert_close(output, stream_forecast_ref(*arguments))


# With the output head


def head_for(features, outputs, kind="shifted", seed=0, norm="layer"):
    """A head for features: "shifted", "scaled" (without shift and bias), or "per token"."""
    generator = torch.Generator().manual_seed(seed)
    _, batch, tokens, dim = features.storage.shape
    sizes = (batch, tokens, dim) if kind == "per token" else (batch, dim)
    weight = torch.randn(outputs, dim, generator=generator) / max(1, dim) ** 0.5
    bias, scale, shift = (torch.randn(size, generator=generator) / 2 for size in ((outputs,), sizes, sizes))
    return OutputHead(weight, *((None, scale, None) if kind == "scaled" else (bias, scale, shift)), norm=norm)


def velocity(features, weights, low_rank, head):
    check_stream(features, weights, low_rank)
    head.check(features.storage)
    return stream_velocity_extension(features, weights, low_rank, head)


def assert_velocity_accurate(features, weights, low_rank, head):
    """At most twice the error of plain torch, up to the rounding of the last operation."""
    wide = features._replace(storage=features.storage.double())
    exact = stream_velocity_ref(wide, weights, head, low_rank)
    plain, actual = stream_velocity_ref(features, weights, head, low_rank), velocity(features, weights, low_rank, head)
    assert actual.dtype == torch.float32 and actual.shape == exact.shape and actual.is_contiguous()
    assert torch.equal(actual.isnan(), exact.isnan())
    exact = exact.nan_to_num()
    scale = exact.abs().max() if exact.numel() else 0.0
    error, bound = ((t.nan_to_num().double() - exact).abs().amax((1, 2)) for t in (actual, plain))
    assert (error <= 2 * bound + 2 * torch.finfo(torch.float32).eps * scale).all(), f"{error} against {bound}"


@pytest.mark.parametrize("rank", [0, 5, 33])
@pytest.mark.parametrize("seed", range(5))
def test_all_kinds_of_instructions_are_as_accurate_with_a_head(instructions, rank, seed):
    sizes = dict(dim=[1, 32, 50, 129, 530][seed], tokens=[3, 1, 40, 27, 13][seed])
    anchors, constant = [("per channel", "scalar"), ("scalar", None), ("scalar", "per channel")][seed % 3]
    counts = dict(count=(4, 0, 3), read=(4, 0, 2))
    arguments = case(seed, rank=rank, anchors=anchors, constant=constant, sums=seed % 2, **sizes, **counts)
    head = head_for(arguments[0], [1, 16, 33, 64, 40][seed], ["shifted", "scaled", "per token"][(seed + rank) % 3])
    assert_velocity_accurate(*arguments, head)


@pytest.mark.parametrize("kind", ["shifted", "scaled", "per token"])
@pytest.mark.parametrize("norm", ["rms", None])
def test_all_kinds_of_instructions_are_as_accurate_with_another_norm(instructions, norm, kind):
    for seed, rank in enumerate((0, 5, 33)):
        sizes = dict(dim=[1, 50, 530][seed], tokens=[3, 40, 13][seed], count=(4, 0, 3), read=(4, 0, 2))
        arguments = case(seed, rank=rank, anchors=["per channel", "scalar"][seed % 2], constant="per channel", **sizes)
        assert_velocity_accurate(*arguments, head_for(arguments[0], [1, 33, 40][seed], kind, norm=norm))


@pytest.mark.parametrize("rank", [0, 32])
def test_a_head_keeps_the_digits_of_features_far_from_zero(rank):
    features, weights, low_rank = case(11, rank=rank, dim=300, tokens=14)
    features.storage.add_(1000.0)
    assert_velocity_accurate(features, weights, low_rank, head_for(features, 20))


def test_a_head_of_other_layouts_and_dtypes():
    features, weights, low_rank = case(12, count=(4, 3), rank=5)
    plain = head_for(features, 7)
    parts = [relaid(part.bfloat16(), "sliced") for part in (plain.weight, plain.bias, plain.scale, plain.shift)]
    parts[0] = parts[0].T.contiguous().T  # channels that are apart
    parts[2] = parts[2][:1].expand(2, -1)
    assert_velocity_accurate(features, weights, low_rank, OutputHead(*parts))
    parts[3] = parts[3].T.contiguous().T
    assert_velocity_accurate(features, weights, low_rank, OutputHead(*parts))


@pytest.mark.parametrize("sizes", [(0, 7), (3, 0)], ids=["no tokens", "no outputs"])
def test_nothing_to_project(sizes):
    tokens, outputs = sizes
    arguments = case(tokens=tokens, rank=5)
    assert velocity(*arguments, head_for(arguments[0], outputs)).shape == (1, tokens, outputs)


@pytest.mark.parametrize("rank", [0, 33])
def test_any_number_of_threads_gives_the_same_bytes_with_a_head(rank):
    arguments = case(13, count=(4, 0, 2), tokens=230, dim=517, rank=rank)
    head, threads, velocities = head_for(arguments[0], 40), torch.get_num_threads(), []
    try:
        for n in range(1, 5):
            torch.set_num_threads(n)
            velocities.append(velocity(*arguments, head).view(torch.int32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, velocities[0]) for each in velocities)


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_feature_that_is_not_finite_spreads_over_its_token(value, norm):
    features, weights, low_rank = case(14, rank=5)
    features.storage[(features.cursor[0].long() - 1) % 4, 0, 2, 3] = value
    finite = velocity(features, weights, low_rank, head_for(features, 7, norm=norm)).isfinite()
    assert not finite[0, 2].any() and finite[0, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_float32_has_one_pass_for_the_head(monkeypatch, dtype):
    features, weights, low_rank = case(15, dtype, rank=5)
    head, calls = head_for(features, 7), []
    monkeypatch.setattr("lesa_kernels.stream.op.stream_velocity_extension", lambda *a: calls.append(a) or velocity(*a))
    actual = stream_velocity(features, weights, head, low_rank)
    assert len(calls) == (dtype == torch.float32)
    if not calls:
        assert torch.equal(actual, output_head_ref(forecast(features, weights, low_rank), head))
    learned = OutputHead(head.weight, head.bias, head.scale.requires_grad_(), head.shift)
    assert stream_velocity(features, weights, learned, low_rank).requires_grad and len(calls) <= 1
    operator = torch.ops.lesa_kernels.stream_velocity_cpu.default
    if dtype != torch.float32:
        with pytest.raises(ValueError, match="`storage` must be float32, with at least one channel"):
            operator(*features, *weights, *low_rank, head.weight, None, head.scale, None, 1e-6, "rms")


def test_the_operator_with_a_head_passes_torchs_checks():
    features, weights, low_rank = case(16, rank=5)
    head = head_for(features, 7)
    parts = (head.weight, head.bias, head.scale, head.shift, head.eps, head.norm)
    torch.library.opcheck(torch.ops.lesa_kernels.stream_velocity_cpu.default, (*features, *weights, *low_rank, *parts))


BAD_HEADS = {
    "null weight": (dict(head=(0, 8, 8, 8)), "`head.weight` must not be a null pointer, but got 0"),
    "null scale": (dict(head=(8, 8, 0, 8)), "`head.scale` must not be a null pointer, but got 0"),
    "negative outputs": (dict(outputs=-1), "`head.outputs` must be at least 0, but got -1"),
    "huge outputs": (dict(outputs=2**62), r"`(output|head.weight)` must address at most 2\^63 - 1 bytes"),
    "negative stride": (dict(head_strides=(5, 0, 5, -1)), "`head.shift` must be at least 0, but got -1"),
    "huge stride": (dict(head_strides=(2**62, 0, 5, 0)), r"`head.scale` must address at most 2\^63 - 1 bytes"),
    "unaligned bias": (dict(head=(8, 2, 8, 8)), "`head.bias` must be aligned to its elements of 4 bytes"),
    "unknown norm": (dict(norm="group"), "`head.norm` must be one of none, rms, layer, but got 'group'"),
    "no channel": (dict(storage_sizes=(4, 2, 3, 0)), "`dim` must be at least 1, but got 0"),
    "unknown dtype": (dict(storage_dtype="float16"), "`storage_dtype` must be float32 for an output head"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_the_compiled_head_is_checked_before_it_is_read(monkeypatch, name):
    """The addresses in these calls hold nothing that may be read."""
    changes, message = BAD_HEADS[name]
    head = dict(outputs=3, head=(8, 8, 8, 8), head_strides=(5, 0, 5, 0), eps=1e-6, norm="layer")
    with_head = functools.partial(extension().stream_velocity, **head)
    monkeypatch.setitem(globals(), "extension", lambda: SimpleNamespace(stream_forecast=with_head))
    with pytest.raises(ValueError, match=message):
        raw_forecast(**changes)
