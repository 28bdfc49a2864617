import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels.bspline_kan import (
    BSplineKAN,
    bspline_basis,
    bspline_evaluate,
    bspline_kan,
    bspline_kan_ref,
    local_basis,
)
from lesa_kernels.bspline_kan.knots import knots_refusal, uniform_knots

GRIDS = [(1, (-1, 1)), (5, (-1, 1)), (8, (-2.5, 0.5)), (3, (10.0, 10.75))]
DEGREES = [1, 2, 3, 4, 5]


def knots_of(grid_size, order, grid_range, dtype=torch.float64):
    lo, hi = grid_range
    h = (hi - lo) / grid_size
    return torch.tensor([lo + i * h for i in range(-order, grid_size + order + 1)], dtype=dtype)


def cox_de_boor(x, grid_size, order, grid_range):
    """The textbook recursion over all bases, in the dtype of x."""
    t = knots_of(grid_size, order, grid_range, x.dtype)
    x = x.unsqueeze(-1)
    bases = ((t[:-1] <= x) & (x < t[1:])).to(x.dtype)
    for d in range(1, order + 1):
        left = (x - t[: -d - 1]) / (t[d:-1] - t[: -d - 1]) * bases[..., :-1]
        right = (t[d + 1 :] - x) / (t[d + 1 :] - t[1:-d]) * bases[..., 1:]
        bases = left + right
    return bases


def kan_oracle(x, base_weight, spline_weight, scaler, grid_size, order, grid_range):
    bases = cox_de_boor(x, grid_size, order, grid_range)
    if scaler is None:
        scaler = torch.ones_like(base_weight)
    return F.silu(x) @ base_weight.T + torch.einsum("...ig,oig,oi->...o", bases, spline_weight, scaler)


def span(grid_size, order, grid_range):
    """The ends of the extended grid, one interval beyond the last knots on both sides."""
    lo, hi = grid_range
    h = (hi - lo) / grid_size
    return lo - (order + 1) * h, hi + (order + 1) * h


def scatter_points(n, grid_size, order, grid_range, dtype=torch.float64, seed=0):
    first, last = span(grid_size, order, grid_range)
    random = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (first + (last - first) * random).to(dtype)


def kan_weights(out_features, in_features, bases, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(out_features, in_features), (out_features, in_features, bases), (out_features, in_features)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("order", DEGREES)
@pytest.mark.parametrize("grid_size, grid_range", GRIDS)
def test_basis_equals_cox_de_boor(grid_size, order, grid_range):
    x = scatter_points(300, grid_size, order, grid_range)
    basis = bspline_basis(x, grid_size, order, grid_range)
    assert basis.shape == (300, grid_size + order)
    torch.testing.assert_close(basis, cox_de_boor(x, grid_size, order, grid_range), rtol=0, atol=1e-12)
    assert (basis >= 0).all()


@pytest.mark.parametrize("order", DEGREES)
@pytest.mark.parametrize("grid_size, grid_range", GRIDS)
def test_basis_on_and_beside_knots(grid_size, order, grid_range):
    knots = knots_of(grid_size, order, grid_range)
    up, down = torch.full_like(knots, math.inf), torch.full_like(knots, -math.inf)
    x = torch.cat([knots, knots.nextafter(up), knots.nextafter(down)])
    expected = cox_de_boor(x, grid_size, order, grid_range)
    torch.testing.assert_close(bspline_basis(x, grid_size, order, grid_range), expected, rtol=0, atol=1e-12)


def test_intervals_are_half_open():
    # Knots that are exact in binary, at the degree where the convention decides the value.
    x = torch.tensor([-1.0, -0.75, 0.0, 0.999, 1.0, -1.001])
    index, weights = local_basis(x, grid_size=8, spline_order=0)
    assert index.tolist() == [0, 1, 4, 7, 8, -1]
    assert weights.tolist() == [[1.0]] * 6
    expected = torch.zeros(6, 8)
    expected[range(4), [0, 1, 4, 7]] = 1
    torch.testing.assert_close(bspline_basis(x, 8, 0), expected, rtol=0, atol=0)
    # At degree 1 the slope jumps: on a knot it is that of the interval on the right.
    knot = torch.tensor(0.25, requires_grad=True)
    slope = torch.autograd.functional.jacobian(lambda u: bspline_basis(u, 8, 1), knot)
    assert slope.tolist() == [0, 0, 0, 0, 0, -4, 4, 0, 0]


@pytest.mark.parametrize("order", DEGREES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_partition_of_unity(order, dtype, tolerance):
    x = torch.linspace(-2, 3, 1001, dtype=dtype)[:-1]
    total = bspline_basis(x, 7, order, (-2, 3)).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_nan_and_infinite_points(order):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.1], requires_grad=True)
    basis = bspline_basis(x, 4, order)
    assert basis[0].isnan().all()
    assert (basis[1:5] == 0).all()
    torch.testing.assert_close(basis[5:], cox_de_boor(x[5:].detach(), 4, order, (-1, 1)), rtol=0, atol=1e-6)
    value = bspline_evaluate(x, torch.ones(4 + order), 4, order)
    assert value[0].isnan() and (value[1:5] == 0).all() and value[5].isfinite()
    if order > 0:
        gradient, from_value = (torch.autograd.grad(y.sum(), x)[0] for y in (basis, value))
        assert (gradient[1:5] == 0).all() and (from_value[1:5] == 0).all()


@pytest.mark.parametrize("order", [0, *DEGREES])
def test_local_basis_is_the_window_of_the_dense_one(order):
    x = scatter_points(200, 6, order, (-1, 2))
    index, weights = local_basis(x, 6, order, (-1, 2))
    assert weights.shape == (200, order + 1) and index.dtype == torch.int64
    assert index.min() == -order - 1 and index.max() == 6 + order
    dense = torch.zeros(200, 6 + order, dtype=torch.float64)
    for k in range(order + 1):
        rows = ((index + k >= 0) & (index + k < 6 + order)).nonzero().squeeze(1)
        dense[rows, index[rows] + k] = weights[rows, k]
    torch.testing.assert_close(dense, cox_de_boor(x, 6, order, (-1, 2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", DEGREES)
def test_evaluate_equals_the_dense_sum(order):
    x = scatter_points(60, 5, order, (-1, 1)).view(15, 4)
    g = torch.Generator().manual_seed(1)
    for shape in [(4,), (15, 1), (15, 4), (2, 15, 4), ()]:
        coefficients = torch.randn(*shape, 5 + order, generator=g, dtype=torch.float64)
        expected = (cox_de_boor(x, 5, order, (-1, 1)) * coefficients).sum(-1)
        value = bspline_evaluate(x, coefficients, 5, order)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    shared = x[:, :1]
    coefficients = torch.randn(4, 5 + order, generator=g, dtype=torch.float64)
    expected = (cox_de_boor(shared, 5, order, (-1, 1)) * coefficients).sum(-1)
    torch.testing.assert_close(bspline_evaluate(shared, coefficients, 5, order), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", DEGREES)
def test_gradients_of_splines(order):
    # Inside, in the fading margin, beyond it, and on a knot where the splines are smooth enough.
    points = [-5.0, -1.9, -1.07, -0.63, 0.11, 0.93, 1.36, 4.0] + ([0.2] if order >= 4 else [])
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    c = torch.randn(5 + order, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    rows = torch.randn(len(points), 5 + order, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gradcheck(lambda u: bspline_basis(u, 5, order), x)
    assert gradcheck(lambda u, c: bspline_evaluate(u, c, 5, order), (x, c))
    assert gradcheck(lambda u, c: bspline_evaluate(u, c, 5, order), (x, rows.requires_grad_()))
    assert gradgradcheck(lambda u: bspline_basis(u, 5, order), x)
    assert gradgradcheck(lambda u, c: bspline_evaluate(u, c, 5, order), (x, c))


@pytest.mark.parametrize("order", DEGREES)
def test_gradient_on_knots_equals_that_of_cox_de_boor(order):
    x = knots_of(8, order, (-1, 1)).requires_grad_()  # exact in binary
    c = torch.randn(8 + order, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bspline_evaluate(x, c, 8, order).sum(), x)
    (expected,) = torch.autograd.grad((cox_de_boor(x, 8, order, (-1, 1)) * c).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("with_scaler", [True, False])
def test_gradients_of_the_layer(with_scaler):
    x = torch.tensor([[-4.0, 0.13], [1.27, -1.61], [0.57, 3.0]], dtype=torch.float64)
    base, spline, scaler = kan_weights(3, 2, 7)
    inputs = [x, base, spline] + ([scaler] if with_scaler else [])
    for tensor in inputs:
        tensor.requires_grad_()

    def layer(*tensors):
        return bspline_kan(*tensors, grid_size=4, spline_order=3)

    assert gradcheck(layer, inputs)
    assert gradgradcheck(layer, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_plain_torch(dtype):
    def error(value, reference):
        return (value.double() - reference).abs().max().item()

    x = scatter_points(4000, 8, 3, (-1, 1), dtype)
    reference = cox_de_boor(x.double(), 8, 3, (-1, 1))
    basis = bspline_basis(x, 8)
    assert basis.dtype == dtype
    assert error(basis, reference) <= 2 * error(cox_de_boor(x, 8, 3, (-1, 1)), reference)

    c = torch.randn(11, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = (reference * c.double()).sum(-1)
    value = bspline_evaluate(x, c, 8)
    assert value.dtype == dtype
    assert error(value, reference) <= 2 * error((cox_de_boor(x, 8, 3, (-1, 1)) * c).sum(-1), reference)

    x = x.view(250, 16)
    weights = kan_weights(12, 16, 11, dtype)
    reference = kan_oracle(x.double(), *(w.double() for w in weights), 8, 3, (-1, 1))
    value = bspline_kan(x, *weights, grid_size=8)
    assert value.dtype == dtype
    assert error(value, reference) <= 2 * error(kan_oracle(x, *weights, 8, 3, (-1, 1)), reference)


def test_evaluate_keeps_precision_of_mixed_dtypes():
    x = torch.linspace(-1, 0.99, 50)
    c = torch.randn(8, generator=torch.Generator().manual_seed(0)).bfloat16()
    value = bspline_evaluate(x, c)
    assert value.dtype == torch.float32
    expected = (cox_de_boor(x.double(), 5, 3, (-1, 1)) * c.double()).sum(-1)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_products_low_and_bases_in_float32(dtype):
    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.dtypes = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.dtypes.setdefault(func.overloadpacket.__name__, set()).add(out.dtype)
            return out

    x = scatter_points(96, 5, 3, (-1, 1), torch.float32).view(16, 6)
    weights = kan_weights(4, 6, 8, torch.float32)
    with torch.autocast("cpu", dtype), Products() as seen:
        value = bspline_kan(x, *weights)
    assert value.dtype == dtype
    assert seen.dtypes["mm"] == {dtype}
    assert seen.dtypes["scatter"] == {torch.float32} and seen.dtypes["floor"] == {torch.float32}
    expected = kan_oracle(x.double(), *(w.double() for w in weights), 5, 3, (-1, 1))
    scale = expected.abs().max() * torch.finfo(dtype).eps
    assert ((value.double() - expected).abs().max() / scale) < 2


@pytest.mark.parametrize("grid_size, grid_range", GRIDS)
@pytest.mark.parametrize("order", DEGREES)
def test_layer_equals_the_oracle(grid_size, order, grid_range):
    x = scatter_points(40, grid_size, order, grid_range).view(10, 4)
    base, spline, scaler = kan_weights(3, 4, grid_size + order)
    for s in (scaler, None):
        y = bspline_kan(x, base, spline, s, grid_size, order, grid_range)
        expected = kan_oracle(x, base, spline, s, grid_size, order, grid_range)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bspline_kan_ref(x, base, spline, s, grid_size, order, grid_range), y)


def test_shapes():
    layer = BSplineKAN(4, 3, dtype=torch.float64)
    x = torch.randn(2, 5, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = layer(x)
    assert y.shape == (2, 5, 6, 3)
    torch.testing.assert_close(layer(x[1, 2, 3]), y[1, 2, 3])
    torch.testing.assert_close(layer(x.transpose(0, 2)), y.transpose(0, 2))
    torch.testing.assert_close(layer(x[:, ::2, 1::3]), y[:, ::2, 1::3])
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(layer(wide), y)
    for shape in [(0, 4), (3, 0, 4)]:
        empty = torch.empty(shape, dtype=torch.float64, requires_grad=True)
        out = layer(empty)
        assert out.shape == (*shape[:-1], 3)
        out.sum().backward()
        assert empty.grad.shape == shape and (layer.spline_weight.grad == 0).all()
    assert bspline_basis(torch.tensor(0.3)).shape == (8,)
    assert bspline_evaluate(torch.empty(0, 4), torch.ones(4, 8)).shape == (0, 4)
    c = torch.randn(8, 4, dtype=torch.float64).T
    torch.testing.assert_close(bspline_evaluate(x, c), bspline_evaluate(x, c.contiguous()))


def test_infinite_and_nan_inputs_of_the_layer():
    layer = BSplineKAN(1, 2)
    y = layer(torch.tensor([[math.inf], [math.nan], [100.0]]))
    torch.testing.assert_close(y[0], math.inf * layer.base_weight[:, 0].sign())
    assert y[1].isnan().all()
    torch.testing.assert_close(y[2], 100 * layer.base_weight[:, 0])


def test_evaluate_never_builds_all_bases():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    points, functions, grid_size, order = 128, 16, 61, 3
    x = (2 * torch.rand(points, functions) - 1).requires_grad_()
    c = torch.randn(functions, grid_size + order, requires_grad=True)
    with Largest() as largest:
        bspline_evaluate(x, c, grid_size, order).sum().backward()
    assert largest.numel == points * functions * (order + 1)
    with Largest() as largest:
        (bspline_basis(x, grid_size, order) * c).sum(-1)
    assert largest.numel >= points * functions * (grid_size + order)


def efficient_kan_state(in_features, out_features, grid_size=5, order=3, grid_range=(-1, 1), scaler=True):
    """The state dict that a KANLinear of efficient-kan has, its knots computed as there in float32."""
    g = torch.Generator().manual_seed(3)
    h = (grid_range[1] - grid_range[0]) / grid_size
    state = {
        "base_weight": torch.randn(out_features, in_features, generator=g),
        "spline_weight": torch.randn(out_features, in_features, grid_size + order, generator=g),
    }
    if scaler:
        state["spline_scaler"] = torch.randn(out_features, in_features, generator=g)
    knots = torch.arange(-order, grid_size + order + 1) * h + grid_range[0]
    state["grid"] = knots.expand(in_features, -1).contiguous()
    return state


@pytest.mark.parametrize("grid_size, grid_range", GRIDS)
@pytest.mark.parametrize("scaler", [True, False])
def test_loads_efficient_kan_state_dicts(grid_size, grid_range, scaler):
    state = efficient_kan_state(4, 3, grid_size, 3, grid_range, scaler)
    network = torch.nn.Sequential(torch.nn.Identity(), BSplineKAN(4, 3, grid_size, 3, grid_range))
    network.load_state_dict({f"1.{name}": value for name, value in state.items()}, strict=True)
    x = scatter_points(40, grid_size, 3, grid_range, torch.float32).view(10, 4)
    ones = torch.ones(3, 4)
    expected = kan_oracle(
        x.double(),
        state["base_weight"].double(),
        state["spline_weight"].double(),
        state.get("spline_scaler", ones).double(),
        grid_size,
        3,
        grid_range,
    )
    torch.testing.assert_close(network(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert set(network[1].state_dict()) == {"base_weight", "spline_weight", "spline_scaler", "grid"}


def test_own_state_dict_round_trip():
    source = BSplineKAN(4, 3, 6, 2, (-3, 3))
    x = torch.randn(7, 4)
    target = BSplineKAN(4, 3, 6, 2, (-3, 3))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    BSplineKAN(4, 3, 6, 2, (-3, 3), dtype=torch.bfloat16).load_state_dict(source.state_dict())
    BSplineKAN(4, 3, 6, 2, (-3, 3)).load_state_dict(source.bfloat16().state_dict())
    incomplete = source.state_dict()
    del incomplete["base_weight"]
    with pytest.raises(RuntimeError, match="base_weight"):
        target.load_state_dict(incomplete)


def test_refuses_a_grid_adapted_to_data():
    state = efficient_kan_state(4, 3)
    state["grid"][2] += 0.02 * torch.tensor([0, 0, 0, 0, 1, -1, 2, 0, 0, 0, 0, 0.0])
    layer = BSplineKAN(4, 3)
    before = layer.base_weight.clone()
    with pytest.raises(RuntimeError, match=r"`grid` must hold the uniform knots .* not uniform.*update_grid"):
        layer.load_state_dict(state)
    assert torch.equal(layer.base_weight, before)
    state = efficient_kan_state(4, 3)
    state["grid"][1] *= 1.5  # uniform, but for this feature only
    with pytest.raises(RuntimeError, match="not the same for all input features"):
        layer.load_state_dict(state)
    state["grid"][1] = math.nan
    with pytest.raises(RuntimeError, match="`grid`"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments, remedy",
    [
        ((5, 3, (-2, 2)), r"BSplineKAN\(4, 3, grid_size=5, spline_order=3, grid_range=\(-2, 2\)\)"),
        ((8, 3, (-1, 1)), r"BSplineKAN\(4, 3, grid_size=8, spline_order=3, grid_range=\(-1, 1\)\)"),
        ((6, 2, (-1, 1)), r"BSplineKAN\(4, 3, grid_size=6, spline_order=2, grid_range=\(-1, 1\)\)"),
    ],
)
def test_refuses_another_uniform_grid_with_the_arguments_to_use(arguments, remedy):
    state = efficient_kan_state(4, 3, *arguments)
    network = torch.nn.ModuleDict({"kan": BSplineKAN(4, 3)})
    with pytest.raises(RuntimeError, match=r"`kan.grid` must .*Build the layer as " + remedy):
        network.load_state_dict({f"kan.{name}": value for name, value in state.items()})
    BSplineKAN(4, 3, *arguments).load_state_dict(state)  # the remedy works


def test_a_grid_of_many_inputs_is_checked_without_a_wide_copy():
    """A file can hold a grid with very many rows, all of which are the same."""
    largest = 0

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                largest = max(largest, made.numel())
            return made

    grid = uniform_knots(5, 3, (-1.0, 1.0)).float().repeat(1000, 1)
    with Watched():
        assert knots_refusal("grid", grid, 8, 1000, 5, 3, (-1.0, 1.0), "") is None
    assert largest == grid.shape[1]


def test_refuses_knots_that_are_not_finite():
    state = efficient_kan_state(4, 3)
    state["grid"][:, 0] = -math.inf
    with pytest.raises(RuntimeError, match="`grid` must hold the uniform knots .* not uniform"):
        BSplineKAN(4, 3).load_state_dict(state)


def test_refuses_a_malformed_grid():
    layer = BSplineKAN(4, 3)
    for bad in (torch.zeros(4, 5), torch.zeros(12)):
        with pytest.raises(RuntimeError, match="`grid` must"):
            layer.load_state_dict({**efficient_kan_state(4, 3), "grid": bad})
    with pytest.raises(RuntimeError, match=r"for 5 input features.*BSplineKAN\(5, 3"):
        layer.load_state_dict(efficient_kan_state(5, 3))


def test_initialisation():
    torch.manual_seed(0)
    layer = BSplineKAN(100, 200)
    assert layer.base_weight.abs().max() <= 0.1
    assert layer.base_weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert layer.spline_weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (layer.spline_scaler == 1).all()
    torch.testing.assert_close(layer.grid, knots_of(5, 3, (-1, 1), torch.float32).expand(100, -1))
    assert "grid_size=5, spline_order=3, grid_range=(-1.0, 1.0)" in repr(layer)


def test_argument_errors():
    x = torch.zeros(2, 4)
    base, spline, scaler = kan_weights(3, 4, 8, torch.float32)
    with pytest.raises(ValueError, match="`grid_size` must be an integer of at least 1"):
        bspline_basis(x, grid_size=0)
    with pytest.raises(TypeError, match="`spline_order`"):
        bspline_basis(x, spline_order=2.0)
    with pytest.raises(ValueError, match="`grid_range` must have lo < hi"):
        bspline_basis(x, grid_range=(1, 1))
    with pytest.raises(TypeError, match="`grid_range` must be a pair"):
        BSplineKAN(4, 3, grid_range=1.0)
    with pytest.raises(ValueError, match="`grid_range` must be a finite number"):
        bspline_evaluate(x, torch.ones(8), grid_range=(0, math.inf))
    with pytest.raises(TypeError, match="`x` must have one of the dtypes"):
        bspline_basis(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="`u` must be a torch.Tensor"):
        local_basis(0.5)
    with pytest.raises(ValueError, match="`coefficients` must have a last dimension of grid_size \\+ spline_order = 8"):
        bspline_evaluate(x, torch.ones(4, 9))
    with pytest.raises(ValueError, match="`coefficients` must have leading dimensions that broadcast"):
        bspline_evaluate(x, torch.ones(3, 8))
    with pytest.raises(ValueError, match="`x` must have a last dimension of 4"):
        bspline_kan(torch.zeros(2, 5), base, spline, scaler)
    with pytest.raises(ValueError, match="`x` must have a last dimension of 4"):
        bspline_kan(torch.tensor(1.0), base, spline, scaler)
    with pytest.raises(ValueError, match=r"`spline_weight` must have shape \[3, 4, 8\]"):
        bspline_kan(x, base, spline[..., :7], scaler)
    with pytest.raises(ValueError, match=r"`spline_scaler` must have shape \[3, 4\]"):
        bspline_kan(x, base, spline, scaler[0])
    with pytest.raises(TypeError, match="`base_weight` must have dtype bfloat16"):
        bspline_kan(x.bfloat16(), base, spline, scaler)
    with pytest.raises(ValueError, match="`in_features`"):
        BSplineKAN(0, 3)


def test_backends(without_interpreter, monkeypatch):
    x = torch.zeros(2, 4)
    weights = kan_weights(3, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match=r"`backend` must be one that bspline_kan has for cpu tensors \(torch\)"):
        bspline_kan(x, *weights, backend="triton")
    with pytest.raises(RuntimeError, match="bspline_kan"):
        BSplineKAN(4, 3, backend="triton")(x)
    with pytest.raises(ValueError, match="`backend`"):
        BSplineKAN(4, 3, backend="fast")
    expected = bspline_kan_ref(x, *weights)
    torch.testing.assert_close(bspline_kan(x, *weights, backend="torch"), expected)
    monkeypatch.setenv("LESA_BACKEND", "extension")  # which this operation has not
    torch.testing.assert_close(bspline_kan(x, *weights), expected)


def test_function_transforms_differentiate():
    torch.manual_seed(0)
    x, c = torch.randn(7, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)

    def total(x, c):
        return bspline_evaluate(x, c).square().sum()

    expected = torch.autograd.grad(total(x.requires_grad_(), c.requires_grad_()), [x, c])
    torch.testing.assert_close(torch.func.grad(total, (0, 1))(x.detach(), c.detach()), expected)
    first = torch.func.grad(lambda u: bspline_basis(u)[2])
    u = torch.tensor(0.3, dtype=torch.float64)
    step = 1e-6
    torch.testing.assert_close(torch.func.grad(first)(u), (first(u + step) - first(u - step)) / (2 * step))


def test_compile_traces_forward_and_backward_as_one_graph():
    layer = BSplineKAN(4, 3, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    gradients = torch.autograd.grad(compiled(x).square().sum(), inputs)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)
    c = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    evaluate = torch.compile(bspline_evaluate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(evaluate(x, c).square().sum(), [x, c]),
        torch.autograd.grad(bspline_evaluate(x, c).square().sum(), [x, c]),
    )


@pytest.mark.slow
def test_compiled_code_keeps_nan():
    layer = BSplineKAN(2, 3)
    x = torch.tensor([[0.1, math.nan], [0.2, 5.0], [-0.4, 1.3]])
    compiled = torch.compile(lambda x: (bspline_basis(x), layer(x)), fullgraph=True)
    try:
        with torch.no_grad():
            basis, y = compiled(x)
    except Exception as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        pytest.skip("torch.compile finds no C++ compiler")
    torch.testing.assert_close(basis, bspline_basis(x), equal_nan=True)
    torch.testing.assert_close(y, layer(x), equal_nan=True)
    assert basis[0, 1].isnan().all()
