"""The B-spline KAN layer as a module, interchangeable with efficient-kan's `KANLinear` by its state dict."""

import math

import torch
from torch import nn

from lesa_kernels.bspline_kan.knots import knots_refusal, uniform_knots
from lesa_kernels.bspline_kan.op import run_bspline_kan
from lesa_kernels.bspline_kan.packing import PackedWeight, pack_weight
from lesa_kernels.bspline_kan.reference import check_grid
from lesa_kernels.checks import check_choice, check_int
from lesa_kernels.dispatch import BACKENDS


class BSplineKAN(nn.Module):
    """y = W_b silu(x) + sum over inputs and bases of scaler W_s B(x): a layer of learnable univariate functions.

    State dicts of efficient-kan's `KANLinear` (with its default SiLU base) load strictly. Their grid must be the
    uniform grid of this layer: a grid that was adapted to data (`update_grid`) is refused. A state dict without
    `spline_scaler` (`enable_standalone_scale_spline=False`) loads too: the scaler is set to ones and stays a parameter.

    At initialisation the base weights are uniform in +-1 / sqrt(in), the scalers are one, and the spline weights are
    normal with standard deviation 0.1 / sqrt(in). So it begins as a linear layer on silu(x) with small splines.

    In evaluation mode (`eval()`), where gradients of the parameters are not wanted, the Triton backend keeps the
    weights in the layout of its kernels from one call to the next. That takes as much memory again. Any change of the
    parameters that autograd counts makes them anew. After a change through `parameter.data`, which nobody counts, call
    `train()` and `eval()`.

    Args:
        in_features: size of the last dimension of the input, at least 1.
        out_features: size of the last dimension of the output, at least 1.
        grid_size: G, the number of intervals in `grid_range`.
        spline_order: p, the degree of the splines.
        grid_range: (lo, hi), the ends of the grid, in the units of the input.
        backend: "auto", "triton" or "torch", as for `bspline_kan`.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    Attributes:
        base_weight: [out, in].
        spline_weight: [out, in, G + p].
        spline_scaler: [out, in].
        grid: buffer [in, G + 2p + 1], the knots. It is part of the state dict, and is not used in computations.

    Raises:
        TypeError, ValueError: a size or the grid is not valid, or the backend is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = check_int("in_features", in_features)
        self.out_features = check_int("out_features", out_features)
        self.grid_range = check_grid(grid_size, spline_order, grid_range)
        self.grid_size = int(grid_size)
        self.spline_order = int(spline_order)
        self.backend = check_choice("backend", backend, BACKENDS)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.base_weight = parameter(out_features, in_features)
        self.spline_weight = parameter(out_features, in_features, grid_size + spline_order)
        self.spline_scaler = parameter(out_features, in_features)
        knots = uniform_knots(self.grid_size, self.spline_order, self.grid_range)
        self.register_buffer("grid", knots.repeat(in_features, 1).to(self.base_weight))
        self._packed_weight = PackedWeight()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters again, as the class describes."""
        scale = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.base_weight, -scale, scale)
        nn.init.normal_(self.spline_weight, std=0.1 * scale)
        nn.init.ones_(self.spline_scaler)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]; see `bspline_kan`."""
        return run_bspline_kan(
            x,
            self.base_weight,
            self.spline_weight,
            self.spline_scaler,
            self.grid_size,
            self.spline_order,
            self.grid_range,
            self.backend,
            pack_weight if self.training else self._packed_weight.get,
        )

    def train(self, mode: bool = True) -> "BSplineKAN":
        """As for any module; see the class for what evaluation mode keeps."""
        self._packed_weight.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._packed_weight.clear()
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"_packed_weight": PackedWeight(), **state})

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid_range={self.grid_range}"
        )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        self._packed_weight.clear()
        grid = state_dict.get(prefix + "grid")
        spline_weight = state_dict.get(prefix + "spline_weight")
        if grid is not None and spline_weight is not None:
            mine = (self.in_features, self.grid_size, self.spline_order, self.grid_range)
            remedy = f"Build the layer as BSplineKAN({{inputs}}, {self.out_features}, {{arguments}})."
            refusal = knots_refusal(prefix + "grid", grid, spline_weight.shape[-1], *mine, remedy)
            if refusal is not None:
                errors.append(str(refusal))
                return
            if prefix + "spline_scaler" not in state_dict:
                ones = torch.ones(spline_weight.shape[:-1], dtype=spline_weight.dtype, device=spline_weight.device)
                state_dict = {**state_dict, prefix + "spline_scaler": ones}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
