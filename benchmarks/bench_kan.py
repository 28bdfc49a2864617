"""The B-spline KAN layer, against the Cox-de Boor recursion over all bases, and other packages where they are found.

Other packages are looked for in `peers/` beside this folder, as their repositories come: `peers/efficient-kan`,
`peers/FusionKAN` (built in place) and `peers/FlashKAN`. One that is missing is skipped by name.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lesa_kernels import BSplineKAN, work
from lesa_kernels.bspline_kan import bspline_kan

PEERS = Path(__file__).resolve().parents[1] / "peers"
EXACT_ROWS = 4096  # at a time: all bases of all rows take gigabytes in float64


def plain_kan(x: torch.Tensor, layer: BSplineKAN) -> torch.Tensor:
    """The layer in this package's plain torch form."""
    weights = layer.base_weight, layer.spline_weight, layer.spline_scaler
    return bspline_kan(x, *weights, layer.grid_size, layer.spline_order, layer.grid_range, backend="torch")


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


IMPLEMENTATIONS = {"lesa": lambda x, layer: layer(x), "lesa-torch": plain_kan, "cox-de-boor": cox_de_boor_kan}


def efficient_kan(layer: BSplineKAN) -> torch.nn.Module:
    """The same layer in efficient-kan."""
    module = imported("efficient-kan", "src", "efficient_kan")
    twin = module.KANLinear(layer.in_features, layer.out_features, layer.grid_size, layer.spline_order)
    twin.load_state_dict(layer.state_dict())
    return twin


def fusion_kan(layer: BSplineKAN) -> torch.nn.Module:
    """A layer of the same sizes in FusionKAN, which normalises its input first."""
    module = imported("FusionKAN", ".", "fusion_kan.layer")
    sizes = layer.in_features, layer.out_features, layer.grid_size, layer.spline_order
    return module.FusionKANLayer(*sizes, is_output=True)


def flash_kan(layer: BSplineKAN) -> torch.nn.Module:
    """A layer of the same sizes in FlashKAN, whose outer knots coincide."""
    module = imported("FlashKAN", "", "layers.FlashKAN")
    return module.FlashKAN(layer.in_features, layer.out_features, layer.grid_size, k=layer.spline_order + 1)


def imported(repository: str, source: str, module: str):
    """A module of a peer; skips the benchmark if it isn't there."""
    folder = PEERS / repository / source
    if not folder.is_dir():
        pytest.skip(f"{repository} is not in {PEERS.name}/")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{repository} can't be imported: {error}")
    finally:
        sys.path.remove(str(folder))


# Name -> how it is built from a layer, and whether it computes the same function, so that it can be verified.
PACKAGES = {"efficient-kan": (efficient_kan, True), "fusion-kan": (fusion_kan, False), "flash-kan": (flash_kan, False)}


def in_float64(module: BSplineKAN) -> BSplineKAN:
    """The same layer in double precision, its knots too: those of a narrower layer are rounded."""
    sizes = module.in_features, module.out_features, module.grid_size
    exact = BSplineKAN(*sizes, device=module.grid.device, dtype=torch.float64)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), module.parameters()):
            wide.copy_(narrow)
    return exact


class Setting:
    """A layer, its input, and one implementation of it.

    Args:
        layer: the shape.
        device: where.
        implementation: a name in `IMPLEMENTATIONS` or `PACKAGES`.
        requires_grad: whether gradients are taken.
    """

    def __init__(self, layer, device: torch.device, implementation: str, requires_grad: bool):
        torch.manual_seed(0)
        self.autocast = layer.autocast
        self.device = device
        self.module = BSplineKAN(layer.in_features, layer.out_features, layer.grid_size).to(device, layer.dtype)
        self.module.requires_grad_(requires_grad)
        x = torch.empty(layer.rows, layer.in_features, device=device).uniform_(-1.2, 1.2).to(layer.dtype)
        self.x = x.requires_grad_(requires_grad)
        self.dtype = layer.autocast or layer.dtype  # of the products and the output
        self.up = torch.randn(layer.rows, layer.out_features, device=device).to(self.dtype)
        self.parameters = list(self.module.parameters())
        self.verified = True
        if implementation in PACKAGES:
            make, self.verified = PACKAGES[implementation]
            peer = make(self.module).to(device, layer.dtype).requires_grad_(requires_grad)
            self.parameters = list(peer.parameters())
            if self.verified:  # in the order of the layer's own
                self.parameters = [getattr(peer, name) for name, _ in self.module.named_parameters()]
            self.function = peer
        else:
            function = IMPLEMENTATIONS[implementation]
            self.function = lambda x: function(x, self.module)

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            return self.function(self.x)

    def gradients(self) -> tuple[torch.Tensor, ...]:
        """By the input and the parameters."""
        y = self.forward()
        return torch.autograd.grad(y, [self.x, *self.parameters], self.up.to(y.dtype), allow_unused=not self.verified)

    def exact(self, gradients: bool) -> list[torch.Tensor]:
        """The output, or the gradients, in double precision."""
        module, parts = in_float64(self.module), []
        for x, up in zip(self.x.detach().split(EXACT_ROWS), self.up.split(EXACT_ROWS)):
            x = x.double().requires_grad_(gradients)
            y = cox_de_boor_kan(x, module)
            parts.append(torch.autograd.grad(y, [x, *module.parameters()], up.double()) if gradients else [y.detach()])
        first, *rest = zip(*parts)
        return [torch.cat(first), *(sum(of_rows) for of_rows in rest)]


def assert_close(value, wanted, setting):
    error = (value - wanted).double().norm() / wanted.double().norm()
    # Gradients of parameters are sums over all rows in float32.
    allowed = 20 * torch.finfo(setting.dtype).eps + torch.finfo(torch.float32).eps * len(setting.x) ** 0.5
    assert error < allowed, f"relative error {float(error):.2e}"


def skip_if_unable(implementation, function: Callable) -> None:
    """Skips the benchmark, with its message, if a peer can't make one call: no room, not built, or another size."""
    if implementation not in PACKAGES:
        return
    try:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # theirs, of any kind
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # fails if the device is broken, and with it all that would follow
        pytest.skip(f"{implementation}: {type(error).__name__}: {error}")


def note_peak_memory(benchmark, device: torch.device, function: Callable) -> None:
    """Bytes that one call takes beyond what was there before, on a GPU, for `benchmark.extra_info`."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before


def least_work(layer) -> tuple:
    """What the functions of `lesa_kernels.work` begin with; parameters are read as they are stored."""
    sizes = layer.rows, layer.in_features, layer.out_features, layer.autocast or layer.dtype, layer.grid_size
    return *sizes, 3, layer.dtype.itemsize


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *PACKAGES])
def test_forward(benchmark, timed, against_floor, layer, device, implementation):
    setting = Setting(layer, device, implementation, requires_grad=False)
    skip_if_unable(implementation, setting.forward)
    if setting.verified:
        assert_close(setting.forward(), *setting.exact(gradients=False), setting)
    timed(setting.forward, f"{layer} forward")
    note_peak_memory(benchmark, device, setting.forward)
    against_floor(benchmark, **work.bspline_kan(*least_work(layer)), dtype=setting.dtype)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *PACKAGES])
def test_forward_and_backward(benchmark, timed, against_floor, layer, device, implementation):
    setting = Setting(layer, device, implementation, requires_grad=True)
    skip_if_unable(implementation, setting.gradients)
    if setting.verified:
        for gradient, wanted in zip(setting.gradients(), setting.exact(gradients=True), strict=True):
            assert_close(gradient, wanted, setting)
    timed(setting.gradients, f"{layer} forward and backward")
    note_peak_memory(benchmark, device, setting.gradients)
    arguments = least_work(layer)
    total = work.both(work.bspline_kan(*arguments), work.bspline_kan_backward(*arguments))
    against_floor(benchmark, **total, dtype=setting.dtype)
