"""The dense forecast's kernels against `dense_predict_ref`, on a GPU or in Triton's interpreter."""

import json
import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in it")

from lesa_kernels import dense_predict, launch
from lesa_kernels.feature_ring.reference import dequantise_float8, newest_slots, quantise_float8
from lesa_kernels.predictor.arguments import DenseExperts, RingState, Shape
from lesa_kernels.predictor.kernels import dense
from lesa_kernels.predictor.reference import dense_predict_ref, stage_index
from lesa_kernels.stream.reference import forecast_dtype

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GRID_SIZE, SPLINE_ORDER, HIDDEN = 4, 2, 5
BOUNDS = (0.7, 0.4)
SIGMAS = (0.8, 0.5, 0.3, 0.7, 0.1)  # one on a bound, which belongs to the stage below
LEARNED = ("in_weight", "in_bias", "spline", "out_weight", "out_bias", "mix_weight", "mix_bias")


@pytest.fixture(autouse=True)
def small_blocks(no_backend_override, monkeypatch, tmp_path):
    """Blocks that the small tensors of these tests are several of, and ragged ones."""
    blocks = {"BLOCK_R": 16, "BLOCK_C": 32, "BLOCK_K": 16, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    parts = ("", "_cast", "_bwd_alpha", "_bwd_mix_weight", "_bwd_storage")
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({f"dense_predict{part}": {"any": blocks} for part in parts}))
    monkeypatch.setenv("LESA_TUNED", str(file))


def make(device, counts, lengths, tokens=5, dim=7, capacity=None, dtype=torch.float32, weights=None, bounds=BOUNDS):
    """Arguments by name. Row b has `counts[b]` entries that end anywhere in the ring; the rest of its memory is NaN."""
    generator = torch.Generator().manual_seed(0)
    capacity, batch, stages = capacity or max(lengths), len(counts), len(lengths)
    bounds = bounds[: stages - 1]
    storage = torch.full((capacity, batch, tokens, dim), math.nan)
    sigmas = torch.full((capacity, batch), math.nan)
    cursor = torch.arange(batch, dtype=torch.int32) * 2 % capacity
    for row, count in enumerate(counts):
        for age in range(count):
            slot = (int(cursor[row]) - 1 - age) % capacity
            storage[slot, row] = torch.randn(tokens, dim, generator=generator)
            sigmas[slot, row] = 0.85 + 0.03 * age + 0.01 * row
    values = {"storage": storage.to(dtype), "scales": None, "sigmas": sigmas, "cursor": cursor}
    if dtype == torch.float8_e4m3fn:
        values["storage"], values["scales"] = quantise_float8(storage)
    values["count"] = torch.tensor(counts, dtype=torch.int32)
    values["sigma"] = torch.tensor([SIGMAS[row % len(SIGMAS)] for row in range(batch)])
    shapes = {
        "in_weight": (stages, HIDDEN, max(lengths)),
        "in_bias": (stages, HIDDEN),
        "spline": (stages, HIDDEN, GRID_SIZE + SPLINE_ORDER),
        "out_weight": (stages, HIDDEN),
        "out_bias": (stages,),
        "mix_weight": (sum(lengths), dim, dim),
        "mix_bias": (stages, dim),
    }
    for name, shape in shapes.items():
        values[name] = torch.randn(shape, generator=generator).mul(0.5).to(weights or forecast_dtype(dtype))
    values["mix_weight"] /= dim**0.5
    values = {name: None if value is None else value.to(device) for name, value in values.items()}
    return values | {"stage_bounds": bounds, "history_length": lengths}


def arguments(values):
    """What the launchers and the reference take."""
    ring, experts = (kind(*(values[name] for name in kind._fields)) for kind in (RingState, DenseExperts))
    return ring, experts, Shape(values["stage_bounds"], values["history_length"], GRID_SIZE, SPLINE_ORDER)


def predict(ring, experts, shape, backend="auto"):
    """`dense_predict` of what `arguments` returns."""
    return dense_predict(*ring, *experts, *shape, backend)


def forecast(values):
    return dense.dense_predict_fwd(*arguments(values), forecast_dtype(values["storage"].dtype))


def in_float64(values):
    """The same values, on which the reference computes in float64."""
    exact = dict(values)
    if values["scales"] is not None:
        exact["storage"], exact["scales"] = dequantise_float8(values["storage"], values["scales"]), None
    for name in ("storage", *LEARNED):
        exact[name] = exact[name].double()
    return exact


def error(found, expected):
    """The largest difference; infinite where only one is NaN, or they are infinite in different ways."""
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (found - expected).abs())
    return difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0


def assert_close(found, plain, expected, operand):
    """At most twice as far off as plain torch in the same dtype, and a rounding: products are of `operand`s."""
    assert found.dtype == plain.dtype and found.shape == expected.shape
    size = expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if expected.numel() else 0.0
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(operand).eps)
    assert error(found, expected) <= 2 * error(plain, expected) + rounding * size


def check_forecast(values):
    plain = dense_predict_ref(*arguments(values))
    exact = dense_predict_ref(*arguments(in_float64(values)))
    assert_close(forecast(values), plain, exact, forecast_dtype(values["storage"].dtype))


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@pytest.mark.parametrize("weights", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forecasts_in_every_dtype(kernel_device, dtype, weights):
    check_forecast(make(kernel_device, (3, 1, 0), (2, 3, 2), 18, 20, dtype=dtype, weights=weights))


@pytest.mark.parametrize("lengths", [(1,), (2, 4), (3, 1, 2), (8, 7, 8)])
def test_histories_of_every_length(kernel_device, lengths):
    capacity = max(lengths) + 1
    check_forecast(make(kernel_device, tuple(range(capacity + 1)), lengths, capacity=capacity))


@pytest.mark.parametrize("tokens, dim", [(1, 1), (16, 32), (50, 17), (33, 65)])
def test_tiles_may_be_ragged(kernel_device, tokens, dim):
    check_forecast(make(kernel_device, (1, 2), (2, 2), tokens, dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_blocks(kernel_device, monkeypatch, dtype):
    monkeypatch.delenv("LESA_TUNED")
    monkeypatch.setitem(globals(), "SPLINE_ORDER", 3)
    check_forecast(make(kernel_device, (2, 1), (2, 2), 9, 40, dtype=dtype))


def test_no_tokens(kernel_device):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1), tokens=0)
    assert forecast(values).shape == (3, 0, 7)
    grad = values["storage"].new_zeros(3, 0, 7)
    *of_learned, of_storage = dense.dense_predict_bwd(grad, *arguments(values), True)
    assert of_storage.shape == values["storage"].shape
    assert all((gradient == 0).all() for gradient in of_learned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_storage(kernel_device, dtype):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1), tokens=20, dim=18, dtype=dtype)
    whole = values["storage"].new_full((4, 5, 27, 20), math.nan)
    whole[1:, 1:4, 4:24, 1:19] = values["storage"]
    contiguous = forecast(values)
    values["storage"] = whole[1:, 1:4, 4:24, 1:19]
    assert torch.equal(forecast(values), contiguous)


def test_offsets_beyond_32_bits(kernel_device, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # of 4 GiB
    values = make(kernel_device, (2,), (2,), tokens=3, dim=8, dtype=torch.float16)
    expected = forecast(values)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=kernel_device).as_strided((2, 1, 3, 8), (2**31, 24, 8, 1))
    far.copy_(values["storage"])
    values["storage"] = far
    assert torch.equal(forecast(values), expected)


def test_float8_is_decoded_where_triton_has_no_such_type(kernel_device, monkeypatch):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1), 18, 20, dtype=torch.float8_e4m3fn)
    expected = forecast(values)
    monkeypatch.setattr(launch, "has_float8", lambda: False)
    assert torch.equal(forecast(values), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite_stay_in_their_token(kernel_device, dtype, value):
    values = make(kernel_device, (2, 2, 2), (2, 3, 2), 18, 20, dtype=dtype)
    newest = newest_slots(values["cursor"], values["count"], 3)
    values["storage"][newest[0, 0], 0, 17, 19] = value
    values["storage"][newest[1, 2], 2, 3, 0] = value
    check_forecast(values)
    bad = ~forecast(values).isfinite().all(-1).cpu()
    assert bad.nonzero().tolist() == [[0, 17], [2, 3]]


def test_a_nan_level_spoils_its_row_alone(kernel_device):
    values = make(kernel_device, (2, 2, 2), (2, 3, 2))
    values["sigma"][1] = math.nan
    check_forecast(values)
    assert forecast(values).isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_a_nan_map_spoils_its_stage_alone(kernel_device):
    values = make(kernel_device, (2, 2, 2), (2, 3, 2), 18, 20)
    values["mix_weight"][2, 19, 0] = math.nan  # the first of stage 1
    check_forecast(values)
    bad = forecast(values).isnan()
    assert bad[1, :, 19].all() and bad.sum() == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_of_the_copy_engine(kernel_device, monkeypatch, dtype):
    values = make(kernel_device, (3, 1, 0), (2, 3, 2), 18, 24, dtype=dtype)
    values["mix_weight"][2, 0] = math.nan  # the row after map 1's last, beside its tile
    assert dense.has_tiles(values["storage"], values["mix_weight"]) == (dense.architecture() >= 90)
    monkeypatch.setattr(dense, "has_tiles", lambda storage, mix_weight: False)
    expected = forecast(values)
    monkeypatch.setattr(dense, "has_tiles", lambda storage, mix_weight: True)
    if not launch.INTERPRETED and dense.architecture() < 90:
        pytest.skip("this GPU has no such engine")
    assert error(forecast(values), expected) == 0
    check_forecast(values)


def test_which_features_the_copy_engine_takes(monkeypatch):
    monkeypatch.setattr(dense, "architecture", lambda: 90)
    storage, maps = torch.empty(2, 1, 4, 16, dtype=torch.float16), torch.empty(2, 16, 16, dtype=torch.float16)
    assert dense.has_tiles(storage, maps)
    assert not dense.has_tiles(storage, maps.float())
    assert not dense.has_tiles(storage.float(), maps.float())
    assert not dense.has_tiles(storage[:, :, 1:], maps)
    assert not dense.has_tiles(storage[..., :12].contiguous(), maps[:, :12, :12].contiguous())
    shifted = torch.empty(129, dtype=torch.float16)[1:].view(2, 1, 4, 16)
    assert not dense.has_tiles(shifted, maps)
    monkeypatch.setattr(dense, "architecture", lambda: 80)
    assert not dense.has_tiles(storage, maps)


@pytest.mark.parametrize("architecture, stages", [(80, 4), (89, 3), (90, 4), (100, 4), (120, 3)])
def test_no_more_stages_than_shared_memory_holds(monkeypatch, architecture, stages):
    monkeypatch.delenv("LESA_TUNED")
    monkeypatch.setattr(dense, "architecture", lambda: architecture)
    a = b = torch.empty(1, dtype=torch.bfloat16)
    assert dense.dense_config("dense_predict", torch.bfloat16, a, b)["num_stages"] == stages
    assert dense.dense_config("dense_predict", torch.bfloat16, a.double(), b.double())["num_stages"] >= 1


def gradients(function, values, grad):
    """Of the features, of the maps and of alpha, in each row, by torch."""
    leaves = {name: values[name].detach().clone().requires_grad_() for name in ("storage", "mix_weight", "mix_bias")}
    # alpha is a row's own if its expert is: as many copies of out_bias as rows, one each.
    batch = len(values["count"])
    of_alpha = torch.zeros(batch, device=grad.device, dtype=torch.float64)
    for row in range(batch):
        one = {name: values[name][row : row + 1] for name in ("cursor", "count", "sigma")}
        one |= {name: values[name][:, row : row + 1] for name in ("storage", "sigmas")}
        bias = values["out_bias"].detach().clone().requires_grad_()
        output = function(*arguments(values | one | {"out_bias": bias}))
        of_alpha[row] = torch.autograd.grad(output, bias, grad[row : row + 1].to(output.dtype))[0].sum()
    output = function(*arguments(values | leaves))
    of_storage, *of_maps = torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))
    return *of_maps, of_alpha, of_storage


def check_gradients(values):
    storage = values["storage"]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(storage.shape[1:], generator=generator).to(storage.device, forecast_dtype(storage.dtype))
    expected = gradients(dense_predict_ref, in_float64(values), grad)
    plain = gradients(dense_predict_ref, values, grad)
    found = dense.dense_predict_bwd(grad, *arguments(values), True)
    assert found[2].dtype == torch.float32
    for one, torch_one, exact in zip(found, plain, expected, strict=True):
        assert_close(one, torch_one.to(one.dtype), exact, grad.dtype)


@pytest.mark.parametrize("weights", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_every_dtype(kernel_device, dtype, weights):
    check_gradients(make(kernel_device, (3, 1, 2), (2, 3, 2), 18, 20, dtype=dtype, weights=weights))


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2), (8, 7)])
def test_gradients_of_every_history(kernel_device, lengths):
    """Among them histories with missing entries, whose gradients add up in the oldest."""
    capacity = max(lengths) + 1
    check_gradients(make(kernel_device, (1, capacity // 2, capacity), lengths, capacity=capacity))


def test_the_public_function_launches_the_kernel_once(kernel_device, monkeypatch):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1))
    expected = forecast(values)
    grids = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(dense, "_dense_predict_fwd_kernel", Spy(dense._dense_predict_fwd_kernel))
    assert torch.equal(predict(*arguments(values), "triton"), expected)
    assert grids == [(3,)]  # a tile in each row


def test_gradients_of_the_public_function(kernel_device):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1), tokens=18)
    grad = torch.randn(3, 18, 7, generator=torch.Generator().manual_seed(1)).to(kernel_device)

    def of_all(function, values, *backend):
        leaves = {name: values[name].detach().clone().requires_grad_() for name in ("storage", *LEARNED)}
        output = function(*arguments(values | leaves), *backend)
        return torch.autograd.grad(output, list(leaves.values()), grad.to(output.dtype))

    expected, plain = of_all(dense_predict_ref, in_float64(values)), of_all(dense_predict_ref, values)
    found = of_all(predict, values, "triton")
    for one, torch_one, exact in zip(found, plain, expected, strict=True):
        assert_close(one, torch_one, exact, torch.float32)


def test_gradients_of_ragged_tiles(kernel_device):
    check_gradients(make(kernel_device, (1, 2), (1, 2), 33, 35))


@pytest.mark.parametrize("weights", [None, torch.float32])
def test_gradients_of_maps_over_float8(kernel_device, weights):
    values = make(kernel_device, (3, 1, 2), (2, 3, 2), 18, 20, dtype=torch.float8_e4m3fn, weights=weights)
    grad = torch.randn(3, 18, 20, generator=torch.Generator().manual_seed(1)).to(kernel_device, torch.bfloat16)
    exact = in_float64(values)
    found = dense.dense_predict_bwd(grad, *arguments(values), False)
    assert found[3] is None
    expected = gradients(dense_predict_ref, exact, grad)
    plain = gradients(dense_predict_ref, exact | {name: exact[name].float() for name in ("storage", *LEARNED)}, grad)
    for one, torch_one, value in zip(found[:3], plain, expected):
        assert_close(one, torch_one.to(one.dtype), value, torch.bfloat16)


def test_gradients_of_strided_tensors(kernel_device):
    values = make(kernel_device, (2, 1, 3), (2, 3, 1), tokens=20, dim=18)
    grad = torch.randn(3, 18, 20, generator=torch.Generator().manual_seed(1)).to(kernel_device).transpose(1, 2)
    expected = dense.dense_predict_bwd(grad.contiguous(), *arguments(values), True)
    whole = values["storage"].new_full((4, 5, 27, 20), math.nan)
    whole[1:, 1:4, 4:24, 1:19] = values["storage"]
    values["storage"] = whole[1:, 1:4, 4:24, 1:19]
    found = dense.dense_predict_bwd(grad, *arguments(values), True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_rows_without_history_pass_nothing_on(kernel_device):
    values = make(kernel_device, (2, 0), (2, 2), tokens=3, bounds=(0.05,))  # both in one stage
    grad = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    grad[1] = math.nan  # as the forecast of row 1 is
    of_maps, of_bias, of_alpha, of_storage = dense.dense_predict_bwd(grad, *arguments(values), True)
    assert all(gradient.isfinite().all() for gradient in (of_maps, of_bias, of_alpha, of_storage))
    assert of_alpha[1] == 0 and (of_storage[:, 1] == 0).all()
    alone = {name: values[name][:1] for name in ("cursor", "count", "sigma")}
    alone |= {name: values[name][:, :1].contiguous() for name in ("storage", "sigmas")}
    expected = dense.dense_predict_bwd(grad[:1], *arguments(values | alone), True)
    assert error(of_maps, expected[0]) == error(of_bias, expected[1]) == error(of_storage[:, :1], expected[3]) == 0


def test_gradients_that_are_not_finite_stay_in_their_stage(kernel_device):
    values = make(kernel_device, (2, 2, 2), (2, 2, 2), tokens=3)
    grad = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    grad[1, 2, 4] = math.nan
    of_maps, of_bias, of_alpha, of_storage = dense.dense_predict_bwd(grad, *arguments(values), True)
    assert of_maps.isnan().flatten(1).any(1).tolist() == [False, False, True, True, False, False]
    assert of_bias.isnan().any(1).tolist() == of_alpha.isnan().tolist() == [False, True, False]
    assert of_storage.isnan().any(-1).any(0)[1].tolist() == [False, False, True]
    assert not of_storage[:, [0, 2]].isnan().any()


def test_the_same_gradients_every_time(kernel_device):
    values = make(kernel_device, (2, 3, 1), (2, 2), tokens=20, bounds=(0.05,))  # all in one stage
    grad = torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    first, second = (dense.dense_predict_bwd(grad, *arguments(values), True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_stages_bounds_are_compared_as_in_the_reference(kernel_device):
    values = make(kernel_device, (1,) * 5, (1, 1, 1), tokens=1, dim=1)
    values["sigma"] = torch.tensor([0.7, 0.4, 0.70000005, 0.39999998, math.nan]).to(kernel_device)
    assert stage_index(values["sigma"], BOUNDS).tolist() == [1, 2, 0, 2, 0]
    check_forecast(values)
