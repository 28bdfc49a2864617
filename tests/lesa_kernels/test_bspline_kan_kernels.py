"""The Triton kernels of the B-spline KAN layer: on a GPU, or in Triton's interpreter where there is none."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels.bspline_kan import BSplineKAN, bspline_kan
from lesa_kernels.bspline_kan.packing import pack_weight

kernels = pytest.importorskip("lesa_kernels.bspline_kan.kernels")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

# Numbers that overflow where a compiled kernel makes Inf of them without a word.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

FORMS = ["matrix", "gather"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEGREES = [1, 2, 3, 4, 5]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that small shapes have several of each."""
    config = {"BLOCK_N": 16, "BLOCK_O": 16, "num_warps": 4, "num_stages": 2}

    def launch_config(operation, dtype, device):
        blocks = dict(config) if operation.endswith("_gather") else {**config, "BLOCK_I": 16}
        return {**blocks, "BLOCK_M": 2} if operation == "bspline_kan_bwd_weight" else blocks

    monkeypatch.setattr(kernels, "launch_config", launch_config)


def choose(monkeypatch, form):
    """The form of the kernels. Compiled ones are unrolled where the GPU's architecture says so."""
    monkeypatch.setattr(kernels, "uses_gather", lambda *shape: form == "gather")
    if kernels.architecture() == 0:
        monkeypatch.setattr(kernels, "architecture", lambda: 90 if form == "unrolled" else 0)


def points(shape, device, dtype=torch.float32, seed=0):
    """Inside the default grid, on its fading margin and beyond."""
    g = torch.Generator().manual_seed(seed)
    return (4 * torch.rand(shape, generator=g) - 2).to(device, dtype)


def parameters(in_features, out_features, grid_size, order, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    count = grid_size + order
    shapes = [(out_features, in_features), (out_features, in_features, count), (out_features, in_features)]
    return [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]


def run(backend, tensors, up, grid_size=5, order=3, grid_range=(-1, 1)):
    """The result and the gradients by x, base weight, spline weight and scaler."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = bspline_kan(*leaves, grid_size, order, grid_range, backend)
    return y.detach(), *torch.autograd.grad(y, leaves, up.to(y.dtype))


def assert_as_exact_as_torch(tensors, up, **spline):
    got, plain = run("triton", tensors, up, **spline), run("torch", tensors, up, **spline)
    exact = run("torch", [tensor.double() for tensor in tensors], up.double(), **spline)
    names = ("y", "grad x", "grad base_weight", "grad spline_weight", "grad spline_scaler")
    for name, value, other, wanted in zip(names, got, plain, exact, strict=True):
        assert value.dtype == other.dtype and value.shape == other.shape, name
        error, allowed = (float((v.double() - wanted).norm() / wanted.norm()) for v in (value, other))
        assert error <= 2 * allowed + torch.finfo(value.dtype).eps, f"{name}: {error:.1e}, torch {allowed:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(form, dtype, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    rows, in_features, out_features = 19, 17 if form == "matrix" else 3, 21  # no multiples of anything
    tensors = [points((rows, in_features), kernel_device, dtype)]
    tensors += parameters(in_features, out_features, 5, 3, kernel_device, dtype)
    assert_as_exact_as_torch(tensors, points((rows, out_features), kernel_device, dtype, seed=2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", DEGREES)
@pytest.mark.parametrize("grid_size, grid_range", [(1, (-1, 1)), (6, (10.0, 10.75))])
def test_degrees_and_grids(form, order, grid_size, grid_range, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    lo, hi = grid_range
    x = (lo + hi) / 2 + points((6, 2), kernel_device) * (hi - lo)
    tensors = [x, *parameters(2, 3, grid_size, order, kernel_device)]
    up = points((6, 3), kernel_device, seed=2)
    assert_as_exact_as_torch(tensors, up, grid_size=grid_size, order=order, grid_range=grid_range)


@pytest.mark.parametrize("form", FORMS)
def test_large_grid(form, kernel_device, monkeypatch):
    choose(monkeypatch, form)
    tensors = [points((5, 1), kernel_device), *parameters(1, 2, 70, 3, kernel_device)]
    assert_as_exact_as_torch(tensors, points((5, 2), kernel_device, seed=2), grid_size=70)


def test_default_blocks(kernel_device):
    tensors = [points((9, 16), kernel_device), *parameters(16, 17, 2, 2, kernel_device)]
    assert not kernels.uses_gather(16, 17, 2, 2, torch.float32)
    names = ("bspline_kan_fwd", "bspline_kan_bwd_x", "bspline_kan_bwd_weight")
    before = [dict(kernels.launch_config(name, torch.float32, kernel_device)) for name in names]
    assert_as_exact_as_torch(tensors, points((9, 17), kernel_device, seed=2), grid_size=2, order=2)
    # A small call's blocks are not what the next one starts from.
    assert before == [kernels.launch_config(name, torch.float32, kernel_device) for name in names]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 3])
def test_knots_and_points_outside(form, order, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    # Knots that are exact in binary: at degree 1 the slope jumps there.
    knots = torch.arange(-order - 2, 8 + order + 3) / 4 - 1
    x = torch.cat([knots, torch.tensor([-3e38, -1e4, 1e4, 3e38])]).unsqueeze(1).to(kernel_device)
    tensors = [x, *parameters(1, 3, 8, order, kernel_device)]
    up = points((len(x), 3), kernel_device, seed=2)
    got, wanted = (run(backend, tensors, up, 8, order) for backend in ("triton", "torch"))
    for value, expected in zip(got, wanted):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form, dtype",
    [
        ("matrix", torch.float32),
        ("unrolled", torch.bfloat16),
        pytest.param("unrolled", torch.float32, marks=pytest.mark.slow),
        pytest.param("matrix", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("unrolled", torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", DEGREES)
def test_bases_at_every_place_of_a_group(order, dtype, form, kernel_device, small_blocks, monkeypatch):
    """On knots, inside, on the margins and beyond, with grids that end in each of the four places of a group."""
    choose(monkeypatch, form)
    for grid_size in (1, 4, 6, 15):
        steps = torch.arange(-2 * order - 4, 2 * (grid_size + order) + 5) / 2  # of an interval; all exact in 16 bits
        x = torch.cat([steps, steps + 0.25, torch.tensor([-60000.0, 60000.0, math.inf])])[:, None]
        x = x.to(kernel_device, dtype)
        spline = {"grid_size": grid_size, "spline_order": order, "grid_range": (0.0, float(grid_size))}
        weights = parameters(1, 3, grid_size, order, kernel_device, dtype)
        got, plain = (bspline_kan(x, *weights, **spline, backend=backend) for backend in ("triton", "torch"))
        exact = bspline_kan(x.double(), *(w.double() for w in weights), **spline, backend="torch")
        assert got.dtype == dtype and torch.equal(got[-1], plain[-1]) and got[-1].isinf().all()
        base, spline_weight, scaler = (weight.double().abs() for weight in weights)
        summed = bspline_kan(x.double(), 0 * base, spline_weight, scaler, **spline, backend="torch")
        summed += F.silu(x.double()).abs() * base.T  # of the sizes of what is added
        got, plain, exact, summed = (value[:-1].double() for value in (got, plain, exact, summed))
        allowed = 2 * (plain - exact).abs() + torch.finfo(dtype).eps * (1 + summed)
        assert ((got - exact).abs() <= allowed).all(), grid_size


@triton.jit
def _in_tf32(value):
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot_in_three_passes(a, b, acc, PRECISION: tl.constexpr):
    """What tensor cores are given for "tf32x3": upper and lower parts of both operands, without the least product."""
    if PRECISION != "tf32x3":
        return tl.dot(a, b, acc, input_precision=PRECISION)
    high_a, high_b = _in_tf32(a), _in_tf32(b)
    low_a, low_b = _in_tf32(a - high_a), _in_tf32(b - high_b)
    return tl.dot(high_a, high_b, tl.dot(high_a, low_b, tl.dot(low_a, high_b))) + acc


@pytest.mark.parametrize("form", ["matrix", "unrolled"])
def test_three_passes_are_as_exact_as_float32(form, kernel_device, small_blocks, monkeypatch):
    if kernel_device.type == "cuda":
        pytest.skip("the GPU's own passes are compared by the other tests")
    choose(monkeypatch, form)
    tensors = [points((37, 40), kernel_device), *parameters(40, 33, 8, 3, kernel_device)]
    run_alone = kernels.bspline_kan_fwd(*_packed(tensors), 8, 3, -1.0, 1.0)
    monkeypatch.setattr(kernels, "interpretable_dot", _dot_in_three_passes)
    passes = kernels.bspline_kan_fwd(*_packed(tensors), 8, 3, -1.0, 1.0)
    assert not torch.equal(passes, run_alone)  # it was used
    plain = bspline_kan(*tensors, 8, 3, backend="torch")
    exact = bspline_kan(*(tensor.double() for tensor in tensors), 8, 3, backend="torch")
    error, allowed = (float((value.double() - exact).norm() / exact.norm()) for value in (passes, plain))
    assert error <= 2 * allowed, f"{error:.1e}, torch {allowed:.1e}"


def _packed(tensors):
    x, *weights = tensors
    return x, pack_weight(*weights, x.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinite_inputs(form, dtype, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    x = points((18, 3), kernel_device, dtype)
    x[2, 1], x[5, 0], x[17, 2] = math.nan, math.inf, -math.inf
    tensors = [x, *parameters(3, 4, 5, 3, kernel_device, dtype)]
    up = points((18, 4), kernel_device, dtype, seed=2)
    got, wanted = (run(backend, tensors, up) for backend in ("triton", "torch"))
    for value, expected in zip(got, wanted):
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=8 * tolerance, equal_nan=True)
    y, grad_x = got[:2]
    assert y[2].isnan().all() and y[17].isnan().all() and y[5].isinf().all()
    others = [row for row in range(18) if row not in (2, 5, 17)]
    assert y[others].isfinite().all() and grad_x[others].isfinite().all()
    # What a NaN says of its input's functions; those of other inputs are sound.
    _, _, grad_base, grad_spline, _ = got
    assert grad_spline[:, 1].isnan().all() and grad_spline[:, [0, 2]].isfinite().all()
    assert grad_base[:, 1].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_strides(form, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    weights = parameters(4, 3, 5, 3, kernel_device)
    x = points((2, 3, 4), kernel_device)
    y = bspline_kan(x, *weights, backend="triton")
    torch.testing.assert_close(y, bspline_kan(x, *weights, backend="torch"), rtol=1e-5, atol=1e-5)

    def assert_same(view, expected):
        torch.testing.assert_close(bspline_kan(view, *weights, backend="triton"), expected, rtol=0, atol=0)

    assert_same(x[1, 2], y[1, 2])
    assert_same(x.transpose(0, 1), y.transpose(0, 1))
    assert_same(x[:, ::2], y[:, ::2])
    wide = torch.full((2, 3, 9), math.nan, device=kernel_device)
    wide[..., 3:7] = x  # misaligned rows between others
    assert_same(wide[..., 3:7], y)
    wide[..., 1::2] = x
    assert_same(wide[..., 1::2], y)
    assert_same(x[:1, :1].expand(5, 2, 4), y[:1, :1].expand(5, 2, 3))

    leaf = wide.requires_grad_()
    out = bspline_kan(leaf[..., 1::2], *weights, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), leaf)  # the gradient of a sum has no strides
    expected = torch.autograd.grad(bspline_kan(leaf[..., 1::2], *weights, backend="torch").sum(), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)

    layer = BSplineKAN(4, 3, backend="triton").to(kernel_device)
    for shape in [(0, 4), (3, 0, 4)]:
        empty = torch.empty(shape, device=kernel_device, requires_grad=True)
        out = layer(empty)
        assert out.shape == (*shape[:-1], 3)
        out.sum().backward()
        assert empty.grad.shape == shape and (layer.spline_weight.grad == 0).all()


def test_without_scaler(kernel_device, small_blocks):
    base, spline, _ = parameters(4, 3, 5, 3, kernel_device)
    x = points((6, 4), kernel_device)
    got, expected = (bspline_kan(x, base, spline, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_deterministic(form, kernel_device, small_blocks, monkeypatch):
    choose(monkeypatch, form)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 8)
    tensors = [points((70, 1), kernel_device), *parameters(1, 2, 5, 3, kernel_device)]
    up = points((70, 2), kernel_device, seed=2)
    for first, second in zip(run("triton", tensors, up), run("triton", tensors, up)):
        assert torch.equal(first, second)
    assert_as_exact_as_torch(tensors, up)


def test_the_kernels_run_and_only_those_that_are_needed(kernel_device, small_blocks, monkeypatch):
    calls = []

    def watch(name):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args: calls.append(name) or launch(*args))

    for name in ("bspline_kan_fwd", "bspline_kan_bwd_x", "bspline_kan_bwd_weight"):
        watch(name)
    x, (base, spline, scaler) = points((3, 4), kernel_device), parameters(4, 3, 5, 3, kernel_device)
    bspline_kan(x, base, spline, scaler, backend="torch")
    assert calls == []
    bspline_kan(x, base, spline, scaler, backend="triton")
    assert calls == ["bspline_kan_fwd"]
    BSplineKAN(4, 3, backend="triton").to(kernel_device).requires_grad_(False)(x.requires_grad_()).sum().backward()
    assert calls[1:] == ["bspline_kan_fwd", "bspline_kan_bwd_x"]
    calls.clear()
    bspline_kan(x.detach(), base, spline.requires_grad_(), scaler, backend="triton").sum().backward()
    assert calls == ["bspline_kan_fwd", "bspline_kan_bwd_weight"] and spline.grad.shape == spline.shape


def test_memory_is_only_taken_for_results_and_partial_sums(kernel_device, small_blocks, monkeypatch):
    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in func.overloadpacket.__name__ and out.ndim > 1:  # the interpreter makes vectors
                self.shapes.append(tuple(out.shape))
            return out

    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 4)
    x, grad = points((64, 2), kernel_device), points((64, 3), kernel_device)
    weight = points((9, 2, 3), kernel_device)
    for launch, tensors, shapes in [
        (kernels.bspline_kan_fwd, (x, weight), [(64, 3)]),
        (kernels.bspline_kan_bwd_x, (grad, x, weight), [(64, 2)]),
        (kernels.bspline_kan_bwd_weight, (grad, x, weight), [(9, 2, 3), (4, 9, 2, 3)]),
    ]:
        with Made() as made:
            launch(*tensors, 5, 3, -1.0, 1.0)
        assert made.shapes == shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, kernel_device, small_blocks):
    tensors = [points((18, 17), kernel_device), *parameters(17, 5, 5, 3, kernel_device)]
    up = points((18, 5), kernel_device, seed=2)
    with torch.autocast(kernel_device.type, dtype):
        got, plain = run("triton", tensors, up), run("torch", tensors, up)
    assert got[0].dtype == dtype and all(grad.dtype == torch.float32 for grad in got[1:])
    exact = run("torch", [tensor.double() for tensor in tensors], up.double())
    for value, other, wanted in zip(got, plain, exact):
        error, allowed = ((v.double() - wanted).norm() / wanted.norm() for v in (value, other))
        assert error <= 2 * allowed


def test_compile_traces_forward_and_backward_as_one_graph(kernel_device, small_blocks):
    layer = BSplineKAN(4, 3, backend="triton").to(kernel_device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = points((5, 4), kernel_device).requires_grad_()
    inputs = [x, *layer.parameters()]
    gradients = torch.autograd.grad(compiled(x).square().sum(), inputs)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, kernel_device, small_blocks):
    x, weight = points((5, 4), kernel_device), points((9, 4, 3), kernel_device, dtype)
    spline = 5, 3, -1.0, 1.0
    ops = torch.ops.lesa_kernels
    torch.library.opcheck(ops.bspline_kan, (x.requires_grad_(), weight.requires_grad_(), *spline))
    grad = points((5, 3), kernel_device, dtype)
    for needs in [(True, True), (False, True), (True, False)]:
        torch.library.opcheck(ops.bspline_kan_bwd, (grad, x.detach(), weight.detach(), *spline, *needs))


def test_what_triton_does_not_run(kernel_device, monkeypatch):
    x, weights = points((3, 4), kernel_device), parameters(4, 3, 5, 3, kernel_device)
    double = [tensor.double() for tensor in (x, *weights)]
    with pytest.raises(TypeError, match="`x` must be float32, bfloat16 or float16 on Triton"):
        bspline_kan(*double, backend="triton")
    for order in (0, 6):
        tensors = [x, *parameters(4, 3, 5, order, kernel_device)]
        with pytest.raises(ValueError, match="`spline_order` must be from 1 to 5 on Triton"):
            bspline_kan(*tensors, spline_order=order, backend="triton")
        assert bspline_kan(*tensors, spline_order=order).shape == (3, 3)
    assert bspline_kan(*double).dtype == torch.float64
    monkeypatch.setenv("LESA_BACKEND", "triton")
    assert bspline_kan(*double).dtype == torch.float64

    y = bspline_kan(x.requires_grad_(), *weights, backend="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivatives. Choose backend="torch"'):
        grad.sum().backward()


def test_the_operator_checks_its_arguments(kernel_device):
    op = torch.ops.lesa_kernels.bspline_kan
    x, weight = points((5, 4), kernel_device), points((9, 4, 3), kernel_device)
    with pytest.raises(ValueError, match=r"`weight` must have shape \[8, 4, out\]"):
        op(x, weight, 4, 3, -1.0, 1.0)
    with pytest.raises(ValueError, match="`weight` must be contiguous"):
        op(x, points((9, 3, 4), kernel_device).mT, 5, 3, -1.0, 1.0)
    with pytest.raises(ValueError, match="`spline_order` must be an integer of at least 1 and at most 5"):
        op(x, weight, 8, 0, -1.0, 1.0)
    with pytest.raises(ValueError, match="`grid_range` must have lo < hi"):
        op(x, weight, 5, 3, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"`grad` must have shape \[5, 3\]"):
        torch.ops.lesa_kernels.bspline_kan_bwd(x, x, weight, 5, 3, -1.0, 1.0, True, True)


@pytest.mark.parametrize(
    "in_features, out_features, grid_size, dtype, gather",
    [
        (256, 256, 8, torch.bfloat16, False),
        (256, 256, 8, torch.float32, False),
        (1, 256, 8, torch.bfloat16, True),
        (4, 4, 5, torch.float16, True),
        (256, 256, 64, torch.bfloat16, False),
        (256, 256, 128, torch.bfloat16, True),
        (256, 256, 16, torch.float32, True),
    ],
)
def test_the_form_follows_from_the_shape(in_features, out_features, grid_size, dtype, gather):
    assert kernels.uses_gather(in_features, out_features, grid_size, 3, dtype) == gather
