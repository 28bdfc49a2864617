"""The dense variant's forecast in one launch, and its backward.

The forecast is one matrix product, which sums over the channels of all K features of a sample. A program owns a tile of
tokens and output channels. It loops over the features and their channels, and reads them directly from the ring. The
same kernel without the residual computes what the backward needs from the forward. The gradients are two more products:
`alpha * grad^T @ g_k` for the maps, over all samples of a stage in a fixed order, and `alpha * grad @ mix_weight_k` for
the features.

Matrix products run in the dtype of the features (bfloat16 for float8). Maps in another dtype are rounded tile by tile,
which works but is slower than casting the predictor once.
"""

import itertools
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lesa_kernels.launch import LAUNCH_OPTIONS, architecture, launch_config
from lesa_kernels.predictor.arguments import DenseExperts, RingState, Shape
from lesa_kernels.predictor.kernels.shared import (
    hidden_units,
    history_of,
    of_stage,
    sample_of,
    stage_of,
    stage_values,
)
from lesa_kernels.predictor.reference import stage_index
from lesa_kernels.stream.kernels.shared import (
    load_anchor,
    next_power_of_2,
    operand_dtype,
    rounded_dot,
    stored_bits,
)


@triton.jit
def tile_of(program, rows, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """Which product, row and column a program's tile starts at, among products of `rows` x COLUMNS.

    Programs that run at the same time work on a square of GROUP blocks of rows, so they share the second-level cache.
    """
    across: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    down = tl.cdiv(rows, BLOCK_R)
    place = program % (across * down)
    first = place // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    place = place % (GROUP * across)
    return program // (across * down), (first + place % height) * BLOCK_R, place // height * BLOCK_C


@triton.jit
def chosen(values, i, K: tl.constexpr):
    """values[i] of a tuple of K scalars, for an `i` that only the device knows."""
    value = values[0]
    for k in tl.static_range(1, K):
        value = tl.where(i == k, values[k], value)
    return value


@triton.jit
def alpha_of(
    in_weight,
    in_bias,
    spline,
    out_weight,
    out_bias,
    stage,
    sigma,
    levels,
    n,
    M: tl.constexpr,
    K: tl.constexpr,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The factor of a sample's mixed features; NaN if the sample has no features."""
    alpha = tl.load(out_bias + stage).to(tl.float32) + tl.where(n > 0, 0.0, float("nan"))
    for start in tl.static_range(0, M, BLOCK_M):
        hidden = hidden_units(
            in_weight, in_bias, spline, stage, sigma, levels, n, start, BLOCK_M, M, K, False, GRID, DEGREE
        )
        units = start + tl.arange(0, BLOCK_M)
        alpha += tl.sum(hidden * tl.load(out_weight + stage * M + units, units < M, 0.0).to(tl.float32))
    return alpha


@triton.jit
def load_map(mix_weight, entry, outs, ins, D: tl.constexpr):
    """A tile of one map, `[outs, ins]`; zero beyond its edges."""
    inside = (outs < D)[:, None] & (ins < D)[None, :]
    return tl.load(mix_weight + tl.cast(entry, tl.int64) * (D * D) + outs[:, None] * D + ins[None, :], inside, 0.0)


@triton.jit
def load_tokens(features, row, start, tokens, channels, limit, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """A tile of contiguous features `[B, T, D]` from token `start` on; zero from token `limit` on."""
    inner = tl.arange(0, BLOCK_T)
    inside = (start + inner < limit)[:, None] & (channels < D)[None, :]
    base = features + (tl.cast(row, tl.int64) * tokens + start) * D
    return tl.load(base + inner[:, None] * D + channels[None, :], inside, 0.0)


@triton.jit
def load_channels(features, row, start, tokens, channels, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Like `load_tokens`, as `[channels, BLOCK_T]`. The load itself transposes, which every GPU can pipeline."""
    inner = tl.arange(0, BLOCK_T)
    inside = (channels < D)[:, None] & (start + inner < tokens)[None, :]
    base = features + (tl.cast(row, tl.int64) * tokens + start) * D
    return tl.load(base + channels[:, None] + inner[None, :] * D, inside, 0.0)


@triton.jit
def store_tokens(features, tile, row, start, tokens, channels, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Writes a tile of contiguous features, as `load_tokens` reads it."""
    inner = tl.arange(0, BLOCK_T)
    inside = (start + inner < tokens)[:, None] & (channels < D)[None, :]
    base = features + (tl.cast(row, tl.int64) * tokens + start) * D
    tl.store(base + inner[:, None] * D + channels[None, :], tile.to(features.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens"])
def _dense_predict_fwd_kernel(
    output,
    alphas,
    grad,
    storage,
    storage_tiles,
    scales,
    sigmas,
    cursor,
    count,
    sigma,
    in_weight,
    in_bias,
    spline,
    out_weight,
    out_bias,
    mix_weight,
    mix_weight_tiles,
    mix_bias,
    capacity,
    batch,
    tokens,
    stride_c,
    stride_b,
    stride_t,
    bounds,
    lengths,
    firsts,
    GRID: tl.constexpr,
    DEGREE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    FORECASTS: tl.constexpr,
    HAS_TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    row, start, first_out = tile_of(program, tokens, D, BLOCK_R, BLOCK_C, GROUP)
    outs = first_out + tl.arange(0, BLOCK_C)

    target, stage, slots, levels, n = sample_of(row, sigma, sigmas, cursor, count, batch, capacity, bounds, lengths, K)
    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    length = of_stage(stage, lengths).to(tl.int32)
    first = of_stage(stage, firsts).to(tl.int32)

    # One loop over features and channels, so that the loads of the next feature start before this one is done.
    steps: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    mixed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in tl.range(0, length * steps):
        k = step // steps
        first_in = step % steps * BLOCK_K
        slot = chosen(slots, k, K)
        if HAS_TILES:
            # A tile may include tokens of the next sample or rows of the next map. These parts are not written.
            feature = storage_tiles.load([(slot * batch + row) * tokens + start, first_in])
            weight = mix_weight_tiles.load([(first + k) * D + first_out, first_in])
        else:
            ins = first_in + tl.arange(0, BLOCK_K)
            feature = load_anchor(features, slot, row, start, ins, ins < D, n > 0, BLOCK_R, FLOAT8)
            weight = load_map(mix_weight, first + k, outs, ins, D)
        mixed = rounded_dot(feature, weight.T, mixed, OPERAND)

    # Only now: the first loads need not wait for it, and it reads what other programs have left in the caches.
    alpha = alpha_of(
        in_weight, in_bias, spline, out_weight, out_bias, stage, target, levels, n, M, K, GRID, DEGREE, BLOCK_M
    )
    total = 0.0
    for part in tl.static_range(2):  # the registers do not hold the residual of a whole tile as well
        half = tl.split(mixed.reshape([BLOCK_R, 2, BLOCK_C // 2]).permute(0, 2, 1))[part]
        outs = first_out + part * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        half += tl.load(mix_bias + stage * D + outs, outs < D, 0.0).to(tl.float32)[None, :]
        if FORECASTS:
            newest = load_anchor(features, slots[0], row, start, outs, outs < D, n > 0, BLOCK_R, FLOAT8)
            store_tokens(output, newest + alpha * half, row, start, tokens, outs, D, BLOCK_R)
        else:
            inside = (start + tl.arange(0, BLOCK_R) < tl.where(n > 0, tokens, 0))[:, None] & (outs < D)[None, :]
            upstream = load_tokens(grad, row, start, tokens, outs, tokens, D, BLOCK_R).to(tl.float32)
            total += tl.sum(tl.where(inside, upstream * half, 0.0))
    if not FORECASTS:
        tl.store(output + program, total)
        tl.store(alphas + row, alpha)  # all tiles of a row write the same


@triton.jit(do_not_specialize=["capacity", "batch", "tokens"])
def _dense_predict_bwd_mix_weight_kernel(
    grad_mix_weight,
    grad,
    alphas,
    storage,
    scales,
    sigmas,
    cursor,
    count,
    sigma,
    capacity,
    batch,
    tokens,
    stride_c,
    stride_b,
    stride_t,
    bounds,
    lengths,
    firsts,
    D: tl.constexpr,
    K: tl.constexpr,
    FLOAT8: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    entry, first_out, first_in = tile_of(tl.program_id(0), D, D, BLOCK_R, BLOCK_C, GROUP)
    outs = first_out + tl.arange(0, BLOCK_R)
    ins = first_in + tl.arange(0, BLOCK_C)
    stage = 0
    for i in tl.static_range(1, len(firsts)):
        stage += (entry >= firsts[i]).to(tl.int32)
    k = entry - of_stage(stage, firsts).to(tl.int32)
    length = of_stage(stage, lengths).to(tl.int32)

    features = (storage, scales, batch, tokens, stride_c, stride_b, stride_t)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for row in tl.range(0, batch, num_stages=1):
        slots, levels, n = history_of(sigmas, cursor, count, row, batch, capacity, length, K)
        slot = chosen(slots, k, K)
        there = (stage_of(tl.load(sigma + row).to(tl.float32), bounds) == stage) & (n > 0)
        product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in tl.range(0, tl.where(there, tokens, 0), BLOCK_K):
            upstream = load_channels(grad, row, start, tokens, outs, D, BLOCK_K)
            feature = load_anchor(features, slot, row, start, ins, ins < D, there, BLOCK_K, FLOAT8)
            product = rounded_dot(upstream, feature, product, OPERAND)
        total += tl.where(there, tl.load(alphas + row), 0.0) * product
    inside = (outs < D)[:, None] & (ins < D)[None, :]
    written = grad_mix_weight + tl.cast(entry, tl.int64) * (D * D) + outs[:, None] * D + ins[None, :]
    tl.store(written, total.to(grad_mix_weight.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["capacity", "batch", "tokens"])
def _dense_predict_bwd_storage_kernel(
    grad_storage,
    grad,
    alphas,
    cursor,
    count,
    sigma,
    mix_weight,
    capacity,
    batch,
    tokens,
    bounds,
    lengths,
    firsts,
    D: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    place, start, first_in = tile_of(tl.program_id(0), tokens, D, BLOCK_R, BLOCK_C, GROUP)
    slot, row = place // batch, place % batch
    ins = first_in + tl.arange(0, BLOCK_C)
    stage = stage_of(tl.load(sigma + row).to(tl.float32), bounds)
    length = of_stage(stage, lengths).to(tl.int32)
    first = of_stage(stage, firsts).to(tl.int32)
    there = tl.load(count + row)

    # A slot is one entry of the history or none. The oldest slot is also every missing entry.
    age = (tl.load(cursor + row) - 1 - slot + capacity) % capacity
    last = tl.where(age == there - 1, length, tl.minimum(age + 1, length))
    last = tl.where(age < there, last, 0)
    steps: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    product = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in tl.range(age * steps, last * steps):
        outs = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        upstream = load_tokens(grad, row, start, tokens, outs, tokens, D, BLOCK_R)
        weight = load_map(mix_weight, first + step // steps, outs, ins, D)
        product = rounded_dot(upstream, weight, product, OPERAND)

    alpha = tl.where(age < last, tl.load(alphas + row), 0.0)
    limit = tl.where((age == 0) & (age < last), tokens, 0)
    for part in tl.static_range(2):
        half = tl.split(product.reshape([BLOCK_R, 2, BLOCK_C // 2]).permute(0, 2, 1))[part]
        ins = first_in + part * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        residual = load_tokens(grad, row, start, tokens, ins, limit, D, BLOCK_R).to(tl.float32)
        store_tokens(grad_storage, residual + alpha * half, place, start, tokens, ins, D, BLOCK_R)


# Shared memory in KiB that a program may use, by architecture. All others have at least 99.
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


def dense_config(operation: str, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
    """The configuration of a product `a @ b` for features in `dtype`, with no more stages than shared memory holds.

    The defaults were chosen so that they compile without spilling registers for sm_80, sm_90 and sm_100. They have not
    been timed.
    """
    config = launch_config(operation, dtype, a.device)
    stage = config["BLOCK_K"] * (config["BLOCK_R"] * a.element_size() + config["BLOCK_C"] * b.element_size())
    # One KiB is reserved for other uses by the compiler.
    fitting = (_SHARED_MEMORY.get(architecture(), 99) - 1) * 1024 // stage
    if not 90 <= architecture() < 120:
        fitting += 1  # these tensor cores read registers, so the current stage is not in shared memory
    return {**config, "num_stages": max(min(config["num_stages"], fitting), 1)}


def has_tiles(storage: torch.Tensor, mix_weight: torch.Tensor) -> bool:
    """Whether the copy engine of Hopper and newer GPUs can load the tiles of both factors."""
    return (
        architecture() >= 90
        and storage.dtype == mix_weight.dtype
        and storage.dtype in (torch.bfloat16, torch.float16)
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (storage, mix_weight))
        and storage.shape[3] * storage.element_size() % 16 == 0
    )


def _launch_fwd(
    output: torch.Tensor,
    alphas: torch.Tensor | None,
    grad: torch.Tensor | None,
    ring: RingState,
    experts: DenseExperts,
    shape: Shape,
    config: dict[str, int],
) -> None:
    """Launches `_dense_predict_fwd_kernel`: for forecasts, or, given `grad`, for the gradient's parts of alpha."""
    storage, mix_weight, hidden = ring.storage, experts.mix_weight, experts.in_weight.shape[1]
    capacity, batch, tokens, width = storage.shape
    tiles = has_tiles(storage, mix_weight)
    stored, float8 = stored_bits(storage)
    grid = (batch * _tiles_in(tokens, width, config),)
    _dense_predict_fwd_kernel[grid](
        output,
        alphas,
        grad,
        stored,
        _descriptor(storage, config["BLOCK_R"], config["BLOCK_K"]) if tiles else None,
        ring.scales,
        ring.sigmas,
        ring.cursor,
        ring.count,
        ring.sigma,
        experts.in_weight,
        experts.in_bias,
        experts.spline,
        experts.out_weight,
        experts.out_bias,
        mix_weight,
        _descriptor(mix_weight, config["BLOCK_C"], config["BLOCK_K"]) if tiles else None,
        experts.mix_bias,
        capacity,
        batch,
        tokens,
        *storage.stride()[:3],
        *_stage_values(shape),
        GRID=shape.grid_size,
        DEGREE=shape.spline_order,
        D=width,
        M=hidden,
        K=shape.longest,
        FLOAT8=float8,
        OPERAND=operand_dtype(storage.dtype),
        FORECASTS=grad is None,
        HAS_TILES=tiles,
        BLOCK_M=next_power_of_2(min(hidden, 256)),
        **config,
        **LAUNCH_OPTIONS,
    )


def _stage_values(shape: Shape) -> tuple[tuple[float, ...], ...]:
    """`stage_values`, and where the maps of each stage start among those of all stages, also as floats."""
    bounds, lengths = stage_values(shape)
    firsts = [float(first) for first in itertools.accumulate(shape.history_length[:-1], initial=0)]
    return bounds, lengths, (*firsts, *[math.inf] * (len(lengths) - len(firsts)))


def _descriptor(matrices, rows, columns):
    return TensorDescriptor.from_tensor(matrices.view(-1, matrices.shape[-1]), [rows, columns])


def _tiles_in(rows, columns, config):
    return triton.cdiv(rows, config["BLOCK_R"]) * triton.cdiv(columns, config["BLOCK_C"])


def dense_predict_fwd(
    ring: RingState,
    experts: DenseExperts,
    shape: Shape,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launches the dense forecast once; arguments as in `dense_predict`, checked there."""
    storage, mix_weight = ring.storage, experts.mix_weight
    output = torch.empty(storage.shape[1:], dtype=out_dtype, device=storage.device)
    if output.numel():
        wide = mix_weight.element_size() > max(storage.element_size(), 2)
        operation = "dense_predict_cast" if wide else "dense_predict"
        config = dense_config(operation, storage.dtype, storage, mix_weight)
        _launch_fwd(output, None, None, ring, experts, shape, config)
    return output


def dense_predict_bwd(
    grad: torch.Tensor,
    ring: RingState,
    experts: DenseExperts,
    shape: Shape,
    needs_storage: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launches the backward of the dense forecast.

    Args:
        grad: `[B, T, D]`, the gradient of the forecast.
        needs_storage: whether the gradient of the features is wanted too; not for float8.

    Returns:
        The gradients of `mix_weight` and `mix_bias`, in their dtypes; of each sample's alpha, `[B]` float32, for the
        KAN's own backward; and of `storage`, in its dtype, or None.
    """
    storage, mix_weight = ring.storage, experts.mix_weight
    capacity, batch, tokens, width = storage.shape
    grad_storage = torch.empty_like(storage, memory_format=torch.contiguous_format) if needs_storage else None
    if grad.numel() == 0:
        grad_alpha = grad.new_zeros(batch, dtype=torch.float32)
        return torch.zeros_like(mix_weight), torch.zeros_like(experts.mix_bias), grad_alpha, grad_storage
    grad = grad.contiguous()
    grad_mix_weight = torch.empty_like(mix_weight)

    config = dense_config("dense_predict_bwd_alpha", storage.dtype, storage, mix_weight)
    parts = grad.new_empty(batch, _tiles_in(tokens, width, config), dtype=torch.float32)
    alphas = grad.new_empty(batch, dtype=torch.float32)
    _launch_fwd(parts, alphas, grad, ring, experts, shape, config)

    common = {"D": width, "OPERAND": operand_dtype(storage.dtype)}
    stored, float8 = stored_bits(storage)
    config = dense_config("dense_predict_bwd_mix_weight", storage.dtype, grad, storage)
    grid = (sum(shape.history_length) * _tiles_in(width, width, config),)
    _dense_predict_bwd_mix_weight_kernel[grid](
        grad_mix_weight,
        grad,
        alphas,
        stored,
        ring.scales,
        ring.sigmas,
        ring.cursor,
        ring.count,
        ring.sigma,
        capacity,
        batch,
        tokens,
        *storage.stride()[:3],
        *_stage_values(shape),
        K=shape.longest,
        FLOAT8=float8,
        **common,
        **config,
        **LAUNCH_OPTIONS,
    )
    if needs_storage:
        config = dense_config("dense_predict_bwd_storage", storage.dtype, grad, mix_weight)
        grid = (capacity * batch * _tiles_in(tokens, width, config),)
        _dense_predict_bwd_storage_kernel[grid](
            grad_storage,
            grad,
            alphas,
            ring.cursor,
            ring.count,
            ring.sigma,
            mix_weight,
            capacity,
            batch,
            tokens,
            *_stage_values(shape),
            **common,
            **config,
            **LAUNCH_OPTIONS,
        )

    # A row without history has no gradient, although its alpha is NaN.
    of_row = torch.where((ring.count > 0)[:, None], alphas[:, None] * grad.sum(1, dtype=torch.float32), 0.0)
    stage = stage_index(ring.sigma.float(), shape.stage_bounds)
    of_stages = [torch.where((stage == s)[:, None], of_row, 0.0).sum(0) for s in range(shape.stages)]
    grad_mix_bias = torch.stack(of_stages).to(experts.mix_bias.dtype)
    return grad_mix_weight, grad_mix_bias, parts.sum(1), grad_storage
