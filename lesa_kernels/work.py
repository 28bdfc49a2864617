"""The least memory traffic and arithmetic of each operation: the only place with such formulas.

Each function returns `{"bytes": ..., "flops": ...}`. Each byte of memory is counted once, as if a cache served all
later reads of it. A multiplication and an addition are two FLOPs.
"""

import torch

DATASHEETS = {  # name; bytes per second of the memory; FLOPs per second of dense bfloat16 products summed in float32
    "A100": ("A100 80 GB SXM", 2.039e12, 312e12),
    "H100": ("H100 SXM", 3.35e12, 989e12),
    "H200": ("H200 SXM", 4.8e12, 989e12),
    "B200": ("B200 SXM", 8.0e12, 2250e12),
    "RTX4090": ("GeForce RTX 4090", 1.008e12, 165.2e12),
}
"""What NVIDIA's datasheets say about its GPUs."""

SCALE_BYTES = 4  # of a token stored in float8
PARAMETER_BYTES = 4  # predictors keep their parameters in float32


def newton_predict(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    history: int = 4,
    rank: int = 0,
    hidden: int = 64,
    out_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """A newton forecast: K anchors in, one feature out, and the parameters of one stage.

    Args:
        batch, tokens, dim, dtype: of the stored features.
        history: K, the anchors that are read.
        rank: of the residual.
        hidden: spline units of the KAN.
        out_dtype: of the forecast; `dtype` if None, and bfloat16 if that is float8.
    """
    elements = batch * tokens * dim
    parameters = (history - 1) * dim * (hidden + 1)  # coefficients
    flops = 2 * elements * history  # one multiplication and addition for each anchor
    if rank:
        parameters += rank * dim * history + dim  # K - 1 taps down, one product up, its bias
        flops += 2 * elements * rank * history
    written = elements * _out_dtype(dtype, out_dtype).itemsize
    moved = _history_bytes(batch, tokens, dim, dtype, history) + written + parameters * PARAMETER_BYTES
    return {"bytes": moved, "flops": flops}


def dense_predict(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    history: int,
    out_dtype: torch.dtype | None = None,
    parameter_bytes: int = PARAMETER_BYTES,
) -> dict[str, int]:
    """A forecast of the dense variant: K entries in, one feature out, and the K maps of one stage."""
    elements = batch * tokens * dim
    written = elements * _out_dtype(dtype, out_dtype).itemsize
    moved = _history_bytes(batch, tokens, dim, dtype, history) + written + history * dim**2 * parameter_bytes
    return {"bytes": moved, "flops": 2 * elements * dim * history}


def predict_velocity(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    out_channels: int,
    history: int = 4,
    rank: int = 0,
    hidden: int = 64,
    out_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """A newton forecast with the output head: K anchors in, the velocity out; the forecast itself is not written."""
    work = newton_predict(batch, tokens, dim, dtype, history, rank, hidden, out_dtype)
    saved = batch * tokens * (dim - out_channels) * _out_dtype(dtype, out_dtype).itemsize
    # The projection, and each sample's modulation.
    head = (out_channels + 2 * batch) * dim * _out_dtype(dtype, out_dtype).itemsize
    return {
        "bytes": work["bytes"] - saved + head,
        "flops": work["flops"] + 2 * batch * tokens * dim * out_channels,
    }


def stream_velocity(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    out_channels: int,
    history: int,
    out_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """A sum of K anchors with one weight each, and the output head: K anchors in, the velocity out."""
    written, width = batch * tokens * out_channels, _out_dtype(dtype, out_dtype).itemsize
    head = (out_channels + 2 * batch) * dim
    moved = _history_bytes(batch, tokens, dim, dtype, history) + (written + head) * width
    return {"bytes": moved, "flops": 2 * batch * tokens * dim * (history + out_channels)}


def output_head(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    out_channels: int,
) -> dict[str, int]:
    """The output head alone: a feature in, the velocity out."""
    moved = batch * tokens * (dim + out_channels) + (out_channels + 2 * batch) * dim
    return {"bytes": moved * dtype.itemsize, "flops": 2 * batch * tokens * dim * out_channels}


def ring_push(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> dict[str, int]:
    """A push into the ring: one feature in, one slot out, with its scales where `stored` is float8."""
    written = _history_bytes(batch, tokens, dim, stored or dtype, 1)
    return {"bytes": batch * tokens * dim * dtype.itemsize + written, "flops": 0}


def ring_gather(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
) -> dict[str, int]:
    """A read from a ring of `dtype`: one slot in, one feature out, which is float32 where the ring is float8."""
    written = batch * tokens * dim * (torch.float32 if dtype.itemsize == 1 else dtype).itemsize
    return {"bytes": _history_bytes(batch, tokens, dim, dtype, 1) + written, "flops": 0}


def polynomial(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    history: int = 4,
) -> dict[str, int]:
    """A weighted sum of anchors."""
    elements = batch * tokens * dim
    return {"bytes": (history + 1) * elements * dtype.itemsize, "flops": 2 * elements * history}


def bspline_kan(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    grid_size: int = 5,
    spline_order: int = 3,
    parameter_bytes: int | None = None,
) -> dict[str, int]:
    """The KAN layer: the base branch, and for each input the p + 1 bases that are not zero.

    A matrix product on tensor cores multiplies all G + p bases. It computes `(1 + G + p) / (2 + p)` times as much.

    Args:
        rows, in_features, out_features, dtype: of the input and the output.
        grid_size, spline_order: G and p.
        parameter_bytes: of one weight; as `dtype` if None.
    """
    values = rows * (in_features + out_features) * dtype.itemsize
    weights = in_features * out_features * (1 + grid_size + spline_order) * (parameter_bytes or dtype.itemsize)
    return {"bytes": values + weights, "flops": 2 * rows * in_features * out_features * (2 + spline_order)}


def bspline_kan_backward(
    rows: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    grid_size: int = 5,
    spline_order: int = 3,
    parameter_bytes: int | None = None,
) -> dict[str, int]:
    """The gradients of the KAN layer with respect to its input and weights: twice the products of the forward.

    It reads the input, the gradient of the output and the weights. It writes the gradients of the input and weights.
    """
    forward = bspline_kan(rows, in_features, out_features, dtype, grid_size, spline_order, parameter_bytes)
    weights = in_features * out_features * (1 + grid_size + spline_order) * (parameter_bytes or dtype.itemsize)
    moved = forward["bytes"] + rows * in_features * dtype.itemsize + weights
    return {"bytes": moved, "flops": 2 * forward["flops"]}


def both(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """The work of one operation after the other."""
    return {name: first[name] + second[name] for name in first}


def _history_bytes(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    history: int,
) -> int:
    scales = SCALE_BYTES if dtype.itemsize == 1 else 0
    return history * batch * tokens * (dim * dtype.itemsize + scales)


def _out_dtype(
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    return out_dtype or (torch.bfloat16 if dtype.itemsize == 1 else dtype)
