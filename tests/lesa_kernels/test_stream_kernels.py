"""The stream kernels against plain torch in float64: on the GPU, or in Triton's interpreter on the CPU."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels.stream import (
    NO_RESIDUAL,
    NO_SUMS,
    LowRank,
    OutputHead,
    StoredFeatures,
    Weights,
    head_sums,
    stream_forecast,
    stream_velocity,
    stream_velocity_is_fused,
)
from lesa_kernels.stream.geometry import Device, Problem, SumsLaunch, forecast_launch, sums_launch, tiling

pytest.importorskip("triton")
from lesa_kernels.stream import fused  # noqa: E402
from lesa_kernels.stream.kernels import forecast, shared, sums  # noqa: E402

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore:.*scalar")]


def quantised(values, dtype):
    """Features in the dtype in which they are stored, and the tokens' scales for float8."""
    if dtype != FLOAT8:
        return values.to(dtype), None
    scales = values.abs().amax(-1) / 448
    return (values / scales[..., None]).to(dtype), scales


class Case:
    """Arguments of a stream operation. Slots that no row reads, and weights of them, are NaN."""

    def __init__(
        self, device, dtype=torch.float32, batch=1, tokens=5, width=24, history=4, rank=0, outputs=6,
        per_channel=True, constant="channels", mean=0.0, spread=1.0, outlier=0.0, counts=None, capacity=None, seed=0,
        norm="layer", per_token=None,
    ):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        wide = torch.bfloat16 if dtype == FLOAT8 else dtype

        def normal(*sizes):
            return torch.randn(sizes, generator=random)

        capacity = capacity or history + 1
        there = torch.full((batch,), capacity)
        wanted = torch.tensor(counts or [history] * batch)
        cursor = torch.randint(0, capacity, (batch,), generator=random)
        features = spread * (normal(1, batch, tokens, width) + 0.3 * normal(capacity, batch, tokens, width)) + mean
        features[..., width // 2] += outlier
        storage, scales = quantised(features, dtype)
        unread = (cursor - 1 - torch.arange(capacity)[:, None]) % capacity
        for row in range(batch):
            for slot in unread[int(wanted[row]) :, row]:
                storage[slot, row] = torch.tensor(math.nan).to(dtype)
        self.features = StoredFeatures(storage, scales, cursor.int(), there.int())
        anchors = 0.4 * normal(batch, history, *([width] if per_channel else []))
        anchors[:, 0] += 1 - anchors.sum(1)
        added = {None: None, "scalar": normal(batch), "channels": normal(batch, width)}[constant]
        taps = normal(batch, history - 1, history).tril(1)
        for row in range(batch):
            anchors[row, int(wanted[row]) :] = math.nan
            taps[row, :, int(wanted[row]) :] = math.nan
        stage = torch.arange(batch).int() % 3
        residual = (taps, stage) if rank else (None, None)
        self.weights = Weights(anchors, wanted.int(), added, *residual)
        down, up = normal(3, rank, history - 1, width) / width**0.5, normal(3, width, rank) / width**0.5
        self.low_rank = LowRank(down.to(wide), up.to(wide)) if rank else NO_RESIDUAL
        weight = (normal(outputs, width) / width**0.5).to(wide)
        scale, shift = 0.3 * normal(batch, 2 * width).to(wide)[:, :width], normal(batch, width).to(wide)
        if per_token:
            scale, shift = (normal(batch, tokens, 2, width) * torch.tensor([[0.3], [1.0]])).to(per_token).unbind(2)
        self.head = OutputHead(weight, normal(outputs).to(wide), scale, shift, norm=norm)
        self._move(device)

    def _move(self, device):
        def moved(parts):
            return [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]

        self.features = StoredFeatures(*moved(self.features))
        self.weights = Weights(*moved(self.weights))
        self.low_rank = LowRank(*moved(self.low_rank))
        head = self.head
        self.head = OutputHead(*moved((head.weight, head.bias, head.scale, head.shift)), head.eps, head.norm)

    def exact(self):
        """The same arguments in float64."""

        def double(parts):
            return [
                part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in parts
            ]

        twin = object.__new__(Case)
        storage, scales = self.features.storage.float(), self.features.scales
        storage = storage if scales is None else storage * scales[..., None]
        twin.features = StoredFeatures(storage.double(), None, *self.features[2:])
        twin.weights = Weights(*double(self.weights))
        twin.low_rank = LowRank(*double(self.low_rank))
        head = self.head
        twin.head = OutputHead(*double((head.weight, head.bias, head.scale, head.shift)), head.eps, head.norm)
        return twin

    def forecast(self, backend="triton"):
        return stream_forecast(self.features, self.weights, self.low_rank, backend=backend)

    def velocity(self, backend="triton", sums=NO_SUMS):
        return stream_velocity(self.features, self.weights, self.head, self.low_rank, sums, backend=backend)

    def problem(self, outputs):
        return shared.problem_of(self.features, self.weights, outputs, self.low_rank.rank)


def assert_as_good(actual, plain, exact):
    """At most twice as far from the exact values as plain torch, but for the result's rounding."""
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    missing = exact.isnan()
    assert torch.equal(actual.isnan(), missing)
    error = (actual.double() - exact).abs().masked_fill(missing, 0.0)
    plain_error = (plain.double() - exact).abs().masked_fill(missing, 0.0).amax() if exact.numel() else 0.0
    allowed = 2 * plain_error + torch.finfo(actual.dtype).eps * exact.abs() + 1e-6
    assert ((error <= allowed) | missing).all(), f"error {error.max():.3g}, allowed {allowed.nan_to_num().min():.3g}"


def check_forecast(case):
    assert_as_good(case.forecast(), case.forecast("torch"), case.exact().forecast("torch"))


def check_velocity(case):
    """In one kernel: the unfused path would be right too."""
    assert stream_velocity_is_fused(case.features, case.weights, case.head, case.low_rank)
    assert_as_good(case.velocity(), case.velocity("torch"), case.exact().velocity("torch"))


@pytest.fixture
def divided(monkeypatch):
    """Makes the kernels divide their work in a given way: `divided(splits, groups)`."""

    def divide(splits, groups):
        def launch(features, weights, outputs, rank):
            problem = shared.problem_of(features, weights, outputs, rank)
            chosen = tiling(shared.device_of(features.device), problem)
            tiles = math.ceil(math.ceil(problem.tokens / groups) / chosen.block_t)
            rounds, together = (tiles, 1) if splits == 1 else (1, tiles)
            programs = problem.batch * groups * splits
            return SumsLaunch(chosen, programs, groups, splits, rounds, together, programs * together * chosen.part)

        def simple(device, problem):
            chosen = forecast_launch(device, problem)
            blocks = -(-problem.width // chosen.block_d)
            return replace(chosen, groups=groups, programs=problem.batch * groups * blocks)

        monkeypatch.setattr(sums, "sums_launch", launch)
        monkeypatch.setattr(forecast, "forecast_launch", simple)

    return divide


@pytest.fixture
def in_order(monkeypatch):
    """Makes the interpreter run the programs of a launch in a given order: `in_order(order)`."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs programs in an order of its own")
    from triton.runtime.interpreter import interpreter_builder

    place = interpreter_builder.set_grid_idx
    return lambda order: monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: place(order[x], y, z))


@each_dtype
def test_forecast_in_each_dtype(dtype, kernel_device):
    check_forecast(Case(kernel_device, dtype, batch=2, tokens=11, width=40, counts=[4, 2]))


@each_dtype
@pytest.mark.parametrize("rank", [0, 3])
def test_velocity_in_each_dtype(dtype, rank, kernel_device, divided):
    divided(2, 1)
    check_velocity(Case(kernel_device, dtype, batch=2, tokens=19, width=40, rank=rank, counts=[4, 2]))


@each_dtype
@pytest.mark.slow
def test_forecast_with_residual_in_each_dtype(dtype, kernel_device, divided):
    divided(2, 1)
    check_forecast(Case(kernel_device, dtype, batch=2, tokens=19, width=40, rank=3, counts=[4, 2]))


@pytest.mark.slow
@pytest.mark.parametrize("history", [1, 2, 8, 16])
@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channels"])
def test_each_history(history, per_channel, kernel_device):
    case = Case(kernel_device, history=history, per_channel=per_channel, rank=2, constant="scalar")
    check_velocity(case)
    check_forecast(case)
    case.low_rank = NO_RESIDUAL
    check_forecast(case)
    check_velocity(case)


@pytest.mark.slow
@pytest.mark.parametrize("constant", [None, "scalar", "channels"])
def test_each_constant(constant, kernel_device):
    case = Case(kernel_device, constant=constant, batch=2)
    check_forecast(case)
    check_velocity(case)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 47])
@pytest.mark.parametrize("width", [5, 33])
def test_sizes_that_fit_no_block(tokens, width, kernel_device):
    case = Case(kernel_device, tokens=tokens, width=width, rank=min(2, width), outputs=1)
    check_forecast(case)
    check_velocity(case)
    case.low_rank = NO_RESIDUAL
    check_forecast(case)
    check_velocity(case)


@pytest.mark.parametrize("rank", [0, 3])
def test_an_empty_batch(rank, kernel_device):
    case = Case(kernel_device, batch=0, rank=rank)
    assert case.forecast().shape == (0, 5, 24)
    assert case.velocity().shape == (0, 5, 6)


@pytest.mark.slow
def test_one_channel(kernel_device):
    check_forecast(Case(kernel_device, width=1, rank=1))
    check_forecast(Case(kernel_device, width=1, tokens=17))


@pytest.mark.slow
@pytest.mark.parametrize("rank, outputs", [(1, 1), (17, 70), (64, 33), (0, 70), (40, 17)])
def test_ranks_and_outputs(rank, outputs, kernel_device, divided):
    """More of them than one step of the end takes at a time."""
    divided(2, 1)
    check_velocity(Case(kernel_device, rank=rank, outputs=outputs, width=70))


@pytest.mark.slow
@pytest.mark.parametrize(
    "splits, groups, rank", [(1, 1, 3), (1, 2, 3), (2, 3, 3), (4, 1, 3), (8, 2, 3), (1, 2, 0), (8, 2, 0)]
)
def test_every_way_to_divide_the_work(splits, groups, rank, kernel_device, divided):
    """Several groups, several tiles in a program, and up to eight parts that meet.

    The ways divide the work alike for each rank, so without one there are two of them: one part, and eight that meet.
    """
    divided(splits, groups)
    case = Case(kernel_device, batch=2, tokens=70, width=150, rank=rank, counts=[4, 3])
    check_velocity(case)
    check_forecast(case)


@pytest.mark.parametrize("rank", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_the_order_of_arrival_does_not_matter(rank, kernel_device, divided, in_order):
    """Each program of a group comes last once. No bit of the results may change."""
    splits = 4
    divided(splits, 1)
    case = Case(kernel_device, torch.bfloat16, batch=1, tokens=20, width=70, rank=rank)
    velocities, forecasts = [], []
    for last in range(splits):
        in_order([*(split for split in range(splits) if split != last), last])
        velocities.append(case.velocity())
        if rank:
            forecasts.append(case.forecast())
    for results in filter(None, (velocities, forecasts)):
        assert all(torch.equal(result, results[0]) for result in results[1:])
        assert results[0].isfinite().all()


@pytest.mark.slow
def test_programs_of_several_groups_may_arrive_in_any_order(kernel_device, divided, in_order):
    divided(4, 3)
    case = Case(kernel_device, batch=2, tokens=70, width=70, rank=3)
    in_order(range(24))
    expected = case.velocity()
    for seed in range(2):
        in_order(torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist())
        assert torch.equal(case.velocity(), expected)


def test_nothing_is_finished_before_the_last_program_has_arrived(kernel_device, divided, in_order, monkeypatch):
    divided(4, 1)
    case = Case(kernel_device, tokens=20, width=70)
    order = [0, 1, 2, 2]
    in_order(order)
    counted = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(sums, "arrival_counters", lambda device, count: counted)
    case.velocity()
    assert counted.item() == 0  # the fourth arrival, whoever it is, has finished, and has cleared the counter
    order[3] = 3
    expected = case.velocity()
    counted.fill_(1)  # as if one had arrived before: the third one finishes without the fourth one's part
    assert not torch.equal(case.velocity(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_without_enough_features_are_nan(rank, kernel_device):
    case = Case(kernel_device, batch=5, rank=rank, counts=[0, 4, 3, 1, 4], capacity=6)
    there = torch.tensor([6, 3, 3, 1, 6], dtype=torch.int32, device=kernel_device)
    case.features = case.features._replace(count=there)
    case.weights.count[4] = -1
    for result in (case.forecast(), case.velocity()):
        assert [bool(row.isnan().all()) for row in result] == [True, True, False, False, True]
        assert result[2:4].isfinite().all()
    check_forecast(case)
    check_velocity(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", [{"outlier": 1000.0}, {"mean": 100.0}, {"mean": -3e4, "spread": 100.0}], ids=str)
def test_features_far_from_zero(place, dtype, kernel_device, divided):
    divided(2, 1)
    check_velocity(Case(kernel_device, dtype, tokens=20, width=70, rank=3, **place))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [3.0, 0.5])
@pytest.mark.parametrize("added", [0.0, 1000.0])
def test_a_forecast_far_from_the_newest_feature(factor, added, kernel_device):
    case = Case(kernel_device, width=70, mean=50.0)
    anchors = case.weights.anchors * factor
    constant = torch.full((anchors.shape[0],), added, device=kernel_device)
    case.weights = case.weights._replace(anchors=anchors, constant=constant)
    check_velocity(case)


@pytest.mark.slow
def test_an_outlier_among_the_channels_that_place_the_others(kernel_device):
    case = Case(kernel_device, width=70)
    case.features.storage[..., 3] += 1000
    check_velocity(case)


@pytest.mark.slow
def test_taps_and_scales_may_be_out_of_float16s_range(kernel_device):
    case = Case(kernel_device, torch.float16, rank=3, width=40, spread=50.0)
    case.weights.taps.mul_(2000)
    case.low_rank.up.mul_(1e-3)
    assert torch.finfo(torch.float16).max < 2000 * 50
    check_forecast(case)
    check_velocity(case)
    case.features.storage[..., 1] = 3e4
    case.head.scale[:, 1] = 10
    check_velocity(case)


@pytest.mark.slow
def test_tokens_with_nan_do_not_disturb_others(kernel_device):
    case = Case(kernel_device, tokens=20, rank=2)
    expected = case.velocity(), case.forecast()
    case.features.storage[:, :, 3, 5] = math.nan
    case.features.storage[:, :, 7, 2] = math.inf
    others = [token for token in range(20) if token not in (3, 7)]
    for before, after in zip(expected, (case.velocity(), case.forecast())):
        assert torch.equal(before[:, others], after[:, others])
        assert after[:, 3].isnan().any() and not after[:, 7].isfinite().all()


@pytest.mark.slow
def test_strided_storage_and_expanded_weights(kernel_device):
    case = Case(kernel_device, torch.bfloat16, batch=2, tokens=20, width=40, rank=2)
    expected = case.velocity(), case.forecast()
    storage = case.features.storage
    roomy = torch.full((9, 5, 23, 50), math.nan, dtype=storage.dtype, device=kernel_device)
    apart = roomy[1:9:2][: len(storage)] if len(storage) <= 4 else roomy[: len(storage)]
    apart = apart[:, 1:5:3, 2:22, 4:44]
    apart.copy_(storage)
    case.features = case.features._replace(storage=apart)
    assert torch.equal(case.velocity(), expected[0]) and torch.equal(case.forecast(), expected[1])
    one = Weights(*(part[:1] for part in case.weights))
    case.weights = Weights(*(part.expand(2, *part.shape[1:]) for part in one))
    assert case.weights.anchors.stride(0) == 0
    check_velocity(case)
    check_forecast(case)


@pytest.mark.slow
def test_weights_of_a_step_of_a_run(kernel_device):
    """They are a part of a tensor with a leading dimension of steps."""
    case = Case(kernel_device, batch=2, rank=2)
    expected = case.velocity()
    steps = Weights(*(torch.stack([torch.zeros_like(part), part]) for part in case.weights))
    case.weights = Weights(*(part[1] for part in steps))
    assert torch.equal(case.velocity(), expected)


@pytest.mark.slow
def test_sums_and_maps_may_be_made_before(kernel_device):
    case = Case(kernel_device, torch.bfloat16, batch=2, rank=3, width=40)
    expected = case.velocity()
    up = case.low_rank.up.float()
    case.low_rank = case.low_rank._replace(square=up.mT @ up, total=up.sum(1))
    made = head_sums(case.head, case.low_rank, case.weights.stage)
    assert torch.equal(case.velocity(sums=made), expected)
    for part in ("ones", "constant", "through", "weight"):  # they are used
        assert not torch.equal(case.velocity(sums=made._replace(**{part: getattr(made, part) + 1})), expected), part


@pytest.mark.slow
@each_dtype
def test_sums_for_another_dtype_are_made_again(dtype, kernel_device):
    case = Case(kernel_device, dtype, rank=3)
    made = head_sums(case.head, case.low_rank, case.weights.stage, torch.float64)
    assert made.weight.shape == (1, 9, 24) and made.weight.dtype == torch.float64
    assert torch.equal(case.velocity(sums=made), case.velocity())


def test_sums_of_another_head_are_refused(kernel_device):
    case = Case(kernel_device, batch=2)
    for name in ("ones", "constant"):
        for wrong in (torch.zeros(1, 6), torch.zeros(2, 5), torch.zeros(2, 6, dtype=torch.int32)):
            made = head_sums(case.head)._replace(**{name: wrong.to(kernel_device)})
            with pytest.raises((ValueError, TypeError), match=f"`sums.{name}` must"):
                case.velocity(sums=made)
    case = Case(kernel_device, batch=2, rank=3)
    made = head_sums(case.head, case.low_rank, case.weights.stage)
    with pytest.raises(ValueError, match="`sums.through` must have shape .2, 3, 6."):
        case.velocity(sums=made._replace(through=made.through[:, :2]))


@pytest.mark.slow
def test_heads_without_shift_and_bias(kernel_device):
    case = Case(kernel_device, batch=2)
    case.head = replace(case.head, shift=None)
    check_velocity(case)
    case.head = replace(case.head, bias=None)
    check_velocity(case)


@pytest.mark.slow
def test_float8_is_decoded_by_its_bits_where_triton_has_no_such_type(kernel_device, monkeypatch):
    case = Case(kernel_device, FLOAT8, batch=2, tokens=20, width=40, rank=2)
    native = case.velocity(), case.forecast()
    for module in (forecast, sums):
        monkeypatch.setattr(module, "stored_bits", lambda storage: (storage.view(torch.uint8), 2))
    assert torch.equal(case.velocity(), native[0]) and torch.equal(case.forecast(), native[1])


@pytest.mark.slow
def test_the_residuals_reading_is_kept_for_a_backward(kernel_device, divided):
    divided(2, 2)
    case = Case(kernel_device, tokens=20, width=70, rank=3)
    read = torch.empty(1, 20, 3, device=kernel_device)
    sums.stream_forecast_fwd(case.features, case.weights, case.low_rank, torch.float32, read)
    exact = case.exact()
    slots = (exact.features.cursor - 1 - torch.arange(4, device=kernel_device)) % 5
    anchors = exact.features.storage[slots.long(), 0]
    taps = torch.einsum("jk,ktd->jtd", exact.weights.taps[0], anchors)
    assert torch.allclose(read.double()[0], torch.einsum("rjd,jtd->tr", exact.low_rank.down[0], taps), atol=1e-4)


FORMS = [("layer", torch.float32), ("rms", None), ("rms", torch.bfloat16), (None, None), (None, torch.float32)]
each_form = pytest.mark.parametrize("norm, per_token", FORMS, ids=str)  # but that of most other tests


@each_form
def test_each_form_of_head(norm, per_token, kernel_device, divided):
    divided(2, 1)
    check_velocity(Case(kernel_device, tokens=18, norm=norm, per_token=per_token))


@pytest.mark.slow
@each_dtype
@each_form
def test_each_form_of_head_in_each_dtype(dtype, norm, per_token, kernel_device, divided):
    divided(2, 1)
    case = Case(kernel_device, dtype, 2, 19, 40, counts=[4, 2], norm=norm, per_token=per_token)
    check_velocity(case)
    case.head = replace(case.head, shift=None)
    check_velocity(case)
    case.head = replace(case.head, bias=None)
    check_velocity(case)
    if not per_token:
        check_velocity(Case(kernel_device, dtype, 2, 19, 40, rank=3, counts=[4, 2], norm=norm))


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("tokens, width, outputs", [(0, 5, 1), (1, 33, 7), (47, 5, 70), (17, 8, 17)])
def test_sizes_that_fit_no_block_of_each_form(tokens, width, outputs, norm, per_token, kernel_device):
    options = {} if per_token else {"rank": 2}
    check_velocity(
        Case(kernel_device, torch.float32, 1, tokens, width, 4, outputs=outputs, norm=norm, per_token=per_token)
    )
    case = Case(
        kernel_device, torch.bfloat16, 2, tokens, width, 2, outputs=outputs, norm=norm, per_token=per_token, **options
    )
    check_velocity(case)


@pytest.mark.slow
@pytest.mark.parametrize("splits, groups", [(1, 2), (8, 1)])
def test_ways_to_divide_the_work_with_a_modulation_for_each_token(splits, groups, kernel_device, divided, in_order):
    divided(splits, groups)
    case = Case(kernel_device, torch.bfloat16, 1, 40, 150, per_token=torch.bfloat16)
    check_velocity(case)
    expected = case.velocity()
    in_order(range(splits * groups - 1, -1, -1))
    assert torch.equal(case.velocity(), expected)


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_features_far_from_zero_in_each_form(dtype, norm, per_token, kernel_device, divided):
    divided(2, 1)
    for place in ({"outlier": 1000.0}, {"mean": 100.0}, {"mean": -3e4, "spread": 100.0}):
        check_velocity(Case(kernel_device, dtype, tokens=20, width=70, norm=norm, per_token=per_token, **place))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_scaled_tokens_may_be_out_of_float16s_range(norm, kernel_device):
    case = Case(kernel_device, torch.float16, width=40, spread=50.0, norm=norm, per_token=torch.float16)
    case.features.storage[..., 1] = 3e4
    case.head.scale[..., 1] = 10
    assert (case.velocity("torch").isfinite()).all()
    check_velocity(case)


@pytest.mark.slow
@each_form
def test_what_is_not_finite_stays_with_its_token_in_each_form(norm, per_token, kernel_device):
    case = Case(kernel_device, tokens=20, norm=norm, per_token=per_token)
    expected, others = case.velocity(), [token for token in range(20) if token not in (3, 7, 11)]
    case.features.storage[:, :, 3, 5] = math.nan
    case.features.storage[:, :, 7, 2] = math.inf
    if per_token:
        case.head.scale[:, 11, 4] = math.nan
    actual = case.velocity()
    assert torch.equal(actual[:, others], expected[:, others])
    assert actual[:, 3].isnan().all() and not actual[:, 7].isfinite().any()
    assert actual[:, 11].isnan().all() == bool(per_token)
    case = Case(kernel_device, batch=2, counts=[0, 3], norm=norm, per_token=per_token)
    assert [bool(row.isnan().all()) for row in case.velocity()] == [True, False]
    check_velocity(case)


@pytest.mark.slow
def test_layouts_of_a_modulation_for_each_token(kernel_device):
    """A part of a table with a conditioning added, as models make it; one row for all tokens; and channels apart."""
    case = Case(kernel_device, batch=2, tokens=20, per_token=torch.float32)
    assert case.head.scale.stride() == (20 * 2 * 24, 2 * 24, 1)
    expected = case.velocity()
    parts = (case.head.scale, case.head.shift)
    case.head = replace(case.head, scale=parts[0].contiguous(), shift=parts[1].contiguous())
    assert torch.equal(case.velocity(), expected)
    case.head = replace(case.head, weight=case.head.weight.T.contiguous().T, bias=case.head.bias.repeat(2, 1).T[:, 0])
    assert torch.equal(case.velocity(), expected)
    one = [part[:, :1].expand(2, 20, 24) for part in parts]
    case.head = replace(case.head, scale=one[0], shift=one[1])
    check_velocity(case)
    case.head = replace(case.head, scale=parts[0].mT.contiguous().mT)
    reason = "the head has a modulation for each token, whose channels are apart"
    assert fused.why_not_fused(case.features, case.weights, case.head) == reason
    assert_as_good(case.velocity(), case.velocity("torch"), case.exact().velocity("torch"))


def test_a_head_for_each_token_is_not_fused_with_a_residual(kernel_device):
    case = Case(kernel_device, rank=2, per_token=torch.float32)
    reason = fused.why_not_fused(case.features, case.weights, case.head, case.low_rank)
    assert reason == "the head has a modulation for each token, and the forecast has a residual"
    assert stream_velocity_is_fused(case.features, case.weights, case.head)
    assert_as_good(case.velocity(), case.velocity("torch"), case.exact().velocity("torch"))
    assert head_sums(case.head, case.low_rank, case.weights.stage) == NO_SUMS  # nothing is the same for all tokens


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_for_each_token_is_one_launch_and_nothing_else(bias, kernel_device, monkeypatch):
    """Torch makes memory and views, but computes nothing."""
    case, launches, called = Case(kernel_device, torch.bfloat16, per_token=torch.float32), [], set()
    case.head = case.head if bias else replace(case.head, bias=None)

    class Launcher:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(grid)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(sums, "_stream_sums_fwd_kernel", Launcher())
    monkeypatch.setattr(sums, "arrival_counters", lambda device, count: None)
    with Watch():
        fused._stream_velocity(case.features, case.weights, case.low_rank, case.head, NO_SUMS)
    assert len(launches) == 1 and called <= {"empty", "fill_", "expand", "select"}


def test_a_norm_that_is_not_known_is_refused(kernel_device):
    case = Case(kernel_device)
    case.head = replace(case.head, norm="batch")
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match="`head.norm` must be one of 'layer', 'rms', None, but got 'batch'"):
            case.velocity(backend)


def test_no_gradients(kernel_device):
    case = Case(kernel_device)
    case.features.storage.requires_grad_()
    with pytest.raises(RuntimeError, match="`backend` must .*gradient is wanted.*torch.no_grad"):
        case.forecast()
    assert torch.autograd.grad(case.forecast("auto").sum(), case.features.storage)[0].isnan().sum() == 0
    with torch.no_grad():
        assert case.forecast().isfinite().all()
    with pytest.raises(RuntimeError, match="stream_forecast on Triton has no gradients"):
        fused.triton_forecast(case.features, case.weights, case.low_rank).sum().backward()


@pytest.mark.slow
def test_a_residual_that_does_not_fit_is_refused_where_triton_was_asked_for(kernel_device, monkeypatch):
    case = Case(kernel_device, rank=3)
    monkeypatch.setattr(sums, "sums_launch", lambda *args: "a rank of 3 needs more registers than sm_00 has")
    for call in (case.forecast, case.velocity):
        with pytest.raises(RuntimeError, match="`backend` must .*a rank of 3 needs more registers.*'triton'.*torch"):
            call()
        assert call("auto").isfinite().all()
    assert Case(kernel_device).forecast().isfinite().all()  # without a residual


def test_operators_know_the_shape_of_their_results(kernel_device):
    case = Case(kernel_device, torch.bfloat16, batch=2, rank=2)  # torch can't compare float8
    head = case.head
    flat = (*case.features, *case.weights, *case.low_rank)
    operators = torch.ops.lesa_kernels
    torch.library.opcheck(operators.stream_forecast.default, flat, test_utils=("test_schema", "test_faketensor"))
    flat = (*flat, head.weight, head.bias, head.scale, head.shift, head.eps, head.norm, *NO_SUMS)
    torch.library.opcheck(operators.stream_velocity.default, flat, test_utils=("test_schema", "test_faketensor"))


ARCHITECTURES = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
PROGRAM_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_a_launch_for_every_problem(architecture):
    device = Device(architecture, ARCHITECTURES[architecture])
    for stored in (1, 2, 4):
        for history in (1, 2, 4, 8, 16):
            for tokens in (1, 4096, 118800):
                launch = forecast_launch(device, Problem(1, tokens, 3072, history, stored))
                assert launch.programs >= 1 and launch.groups <= tokens
            for rank in (0, 32, 64, 128, 256):
                for outputs in (0, 16, 64, 512):
                    chosen = tiling(device, Problem(1, 4096, 3072, history, stored, outputs, rank))
                    if outputs + rank and not isinstance(chosen, str):
                        assert chosen.shared <= PROGRAM_SHARED[architecture] << 10, chosen
                    elif outputs + rank:
                        assert "shared memory or registers than sm_" in chosen
                        assert stored == 4 or history > 4 or (rank, outputs) == (256, 512)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_a_launch_for_modulations_of_each_token(architecture):
    device = Device(architecture, ARCHITECTURES[architecture])
    for stored, operand in ((1, 2), (2, 2), (2, 4), (4, 4)):
        for history in (1, 4, 10):
            for outputs in (16, 64, 128, 192):
                for modulations, products in (((4,), 1), ((2, 2), 2), ((4, 4), 3)):
                    problem = Problem(1, 4096, 3072, history, stored, outputs, 0, modulations, products, operand)
                    chosen = tiling(device, problem)
                    if isinstance(chosen, str):  # to float32 only, or on the GPUs with the smallest shared memory
                        assert "registers than sm_" in chosen and (operand == 4 or architecture in (86, 89, 120))
                        assert outputs > 64 and (products == 3 or history == 10), problem
                        continue
                    assert chosen.shared <= PROGRAM_SHARED[architecture] << 10, chosen
                    launch = sums_launch(device, problem)
                    tiles = launch.programs * launch.together
                    assert launch.scratch == tiles * chosen.block_t * (2 + products * chosen.block_o) <= 8 << 20


def test_scratch_memory_stays_within_its_limit():
    device = Device(90, 132)
    for tokens in (1, 100, 4096, 20400, 118800):
        for batch in (1, 2, 7, 64):
            for rank in (0, 32, 256):
                launch = sums_launch(device, Problem(batch, tokens, 3072, 4, 2, 64, rank))
                assert isinstance(launch, SumsLaunch) and 4 * launch.scratch <= 32 << 20
                assert launch.splits == 1 or launch.rounds == 1
                rows = -(-tokens // launch.groups)
                assert launch.rounds * launch.together * launch.tiling.block_t >= rows


def test_programs_fill_an_h200():
    flux = sums_launch(Device(90, 132), Problem(1, 4096, 3072, 4, 2, 64))
    assert (flux.programs, flux.splits, flux.tiling.resident) == (264, 4, 2)
    assert forecast_launch(Device(90, 132), Problem(1, 4096, 3072, 4, 2)).programs == 264
