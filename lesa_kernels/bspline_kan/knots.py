"""The knots of a uniform grid, and the check of knots that a file holds."""

import torch

from lesa_kernels.checks import Said, argument_error


def uniform_knots(grid_size: int, spline_order: int, grid_range: tuple[float, float]) -> torch.Tensor:
    """The knots of a grid with p more intervals on each side: `[G + 2p + 1]` float64, on the CPU."""
    lo, hi = grid_range
    steps = torch.arange(-spline_order, grid_size + spline_order + 1, dtype=torch.float64, device="cpu")
    return lo + steps * ((hi - lo) / grid_size)


def knots_refusal(
    name: str,
    grid: torch.Tensor,
    bases: int,
    in_features: int,
    grid_size: int,
    spline_order: int,
    grid_range: tuple[float, float],
    remedy: str,
) -> Exception | None:
    """The error to raise if knots are not those of a layer; None if they are.

    Args:
        name: of the knots.
        grid: the knots, `[in_features, G + 2p + 1]` for the layer.
        bases: G + p, the number of bases that the weights beside the knots have.
        in_features, grid_size, spline_order, grid_range: of the layer.
        remedy: what to do about the knots of another uniform grid. `{inputs}` and `{arguments}` in it are replaced by
            their number of input features, and by the grid.
    """
    must = (
        f"hold the uniform knots of grid_size={grid_size}, spline_order={spline_order}, grid_range={grid_range} "
        f"for {in_features} input features"
    )
    order = grid.shape[-1] - 1 - bases if grid.ndim else -1  # G + 2p knots beyond the first, G + p bases
    size = bases - order
    if grid.ndim != 2 or not len(grid) or order < 0 or size < 1:
        return argument_error(name, must, grid, "Load the state dict of a B-spline KAN layer.")
    # The knots were rounded to their dtype after a product and after a sum, in the same way for each input.
    knots = grid[0].detach().to("cpu", torch.float64)
    tolerance = 4 * torch.finfo(grid.dtype).eps * knots.abs().max()
    lo, hi = float(knots[order]), float(knots[order + size])
    is_uniform = ((knots - uniform_knots(size, order, (lo, hi))).abs() <= tolerance).all()
    if not knots.isfinite().all() or not is_uniform or not (grid == grid[0]).all():
        return argument_error(
            name,
            must,
            Said("knots that are not uniform, or not the same for all input features"),
            "This grid was adapted to data: train without `update_grid`, or refit the layer on a uniform grid.",
        )
    mine = uniform_knots(grid_size, spline_order, grid_range)
    shape = (in_features, len(mine))
    if tuple(grid.shape) == shape and order == spline_order and ((knots - mine).abs() <= tolerance).all():
        return None
    arguments = f"grid_size={size}, spline_order={order}, grid_range=({lo:.6g}, {hi:.6g})"
    got = Said(f"those of {arguments} for {grid.shape[0]} input features")
    return argument_error(name, must, got, remedy.format(inputs=grid.shape[0], arguments=arguments))
