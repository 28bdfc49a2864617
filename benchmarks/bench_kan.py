"""The B-spline KAN layer, against the Cox-de Boor recursion over all bases."""

import pytest
import torch
import torch.nn.functional as F

from lesa_kernels import BSplineKAN


def cox_de_boor_kan(x: torch.Tensor, layer: BSplineKAN) -> torch.Tensor:
    """The layer as it is usually written: every basis of every degree is built, `[rows, in, G + 2p]` and down."""
    knots, x_ = layer.grid.to(x.dtype), x.unsqueeze(-1)
    bases = ((knots[:, :-1] <= x_) & (x_ < knots[:, 1:])).to(x.dtype)
    for degree in range(1, layer.spline_order + 1):
        left, right = knots[:, : -degree - 1], knots[:, degree + 1 :]
        rising = (x_ - left) / (knots[:, degree:-1] - left)
        falling = (right - x_) / (right - knots[:, 1:-degree])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    weight = layer.spline_weight * layer.spline_scaler.unsqueeze(-1)
    return F.linear(F.silu(x), layer.base_weight) + F.linear(bases.flatten(1), weight.flatten(1))


IMPLEMENTATIONS = {"lesa": lambda x, layer: layer(x), "cox-de-boor": cox_de_boor_kan}


def in_float64(module: BSplineKAN) -> BSplineKAN:
    """The same layer in double precision, its knots too: those of a narrower layer are rounded."""
    exact = BSplineKAN(module.in_features, module.out_features, device=module.grid.device, dtype=torch.float64)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), module.parameters()):
            wide.copy_(narrow)
    return exact


def build(layer, device, requires_grad):
    torch.manual_seed(0)
    module = BSplineKAN(layer.in_features, layer.out_features).to(device, layer.dtype).requires_grad_(requires_grad)
    x = torch.empty(layer.rows, layer.in_features, device=device).uniform_(-1.2, 1.2).to(layer.dtype)
    return module, x.requires_grad_(requires_grad)


def assert_close(value, wanted, dtype):
    error = (value - wanted).double().norm() / wanted.double().norm()
    assert error < 20 * torch.finfo(dtype).eps, f"relative error {float(error):.2e}"


def least_work(layer) -> dict:
    """FLOPs of the base branch and of the p + 1 bases that are not zero, and bytes in and out."""
    products = layer.rows * layer.in_features * layer.out_features
    weights = layer.in_features * layer.out_features * (1 + 8)  # the base branch, and G + p = 8 coefficients
    values = layer.rows * (layer.in_features + layer.out_features)
    return {"flops": 2 * products * (1 + 4), "bytes": (weights + values) * layer.dtype.itemsize}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward(benchmark, timed, against_floor, layer, device, implementation):
    forward = IMPLEMENTATIONS[implementation]
    module, x = build(layer, device, requires_grad=False)
    exact = cox_de_boor_kan(x.double(), in_float64(module))
    assert_close(forward(x, module), exact, layer.dtype)
    timed(lambda: forward(x, module), f"{layer} forward")
    against_floor(benchmark, **least_work(layer), dtype=layer.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_and_backward(benchmark, timed, against_floor, layer, device, implementation):
    forward = IMPLEMENTATIONS[implementation]
    module, x = build(layer, device, requires_grad=True)
    inputs = [x, *module.parameters()]
    up = torch.randn(layer.rows, layer.out_features, device=device).to(layer.dtype)

    exact_module, exact_x = in_float64(module), x.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        cox_de_boor_kan(exact_x, exact_module), [exact_x, *exact_module.parameters()], up.double()
    )
    for grad, wanted in zip(torch.autograd.grad(forward(x, module), inputs, up), exact):
        assert_close(grad, wanted, layer.dtype)
    timed(lambda: torch.autograd.grad(forward(x, module), inputs, up), f"{layer} forward and backward")
    work = {name: 3 * amount for name, amount in least_work(layer).items()}
    against_floor(benchmark, **work, dtype=layer.dtype)
