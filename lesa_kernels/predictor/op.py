"""The public functions: which implementation runs is decided here, and the operators that torch knows them by."""

import functools

import torch

from lesa_kernels.bspline_kan.op import TRITON_ORDERS
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_choice, check_int, check_tensor
from lesa_kernels.dispatch import resolve_backend
from lesa_kernels.predictor.reference import (
    OutputHead,
    dense_predict_ref,
    forecast_dtype,
    newton_predict_ref,
    newton_velocity_ref,
    output_head_ref,
)

STORED_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)

# What the kernels are written for; plain torch does the rest.
KERNEL_HEAD_OUTPUTS = 256
KERNEL_SCRATCH_BYTES = 1 << 30

_STATE = ("storage", "scales", "sigmas", "cursor", "count", "sigma")
_UNITS = ("in_weight", "in_bias", "spline", "out_weight", "out_bias")
_NEWTON_TENSORS = (*_STATE, *_UNITS, "down", "up", "up_bias")
_DENSE_TENSORS = (*_STATE, *_UNITS, "mix_weight", "mix_bias")
_STATE_DTYPES = (torch.float32, torch.int32, torch.int32, torch.float32)  # of sigmas, cursor, count, sigma
_OPTIONAL = ("scales", "down", "up", "up_bias")

_LIBRARY = torch.library.Library("lesa_kernels", "FRAGMENT")
_RING = "Tensor storage, Tensor? scales, Tensor sigmas, Tensor cursor, Tensor count, Tensor sigma"
_KAN = "Tensor in_weight, Tensor in_bias, Tensor spline, Tensor out_weight, Tensor out_bias"
_NEWTON = f"{_RING}, {_KAN}, Tensor? down, Tensor? up, Tensor? up_bias"
_DENSE = f"{_RING}, {_KAN}, Tensor mix_weight, Tensor mix_bias"
_HEAD = "Tensor weight, Tensor? bias, Tensor scale, Tensor shift, float eps"
_SHAPE = "float[] stage_bounds, int[] history_length, int grid_size, int spline_order"
_LIBRARY.define(f"newton_predict({_NEWTON}, {_SHAPE}, str backend) -> Tensor")
_LIBRARY.define(f"newton_predict_bwd(Tensor grad, {_NEWTON}, {_SHAPE}, bool needs_storage) -> Tensor[]")
_LIBRARY.define(f"newton_velocity({_NEWTON}, {_HEAD}, {_SHAPE}) -> Tensor")
_LIBRARY.define(f"dense_predict({_DENSE}, {_SHAPE}) -> Tensor")
_LIBRARY.define(f"dense_predict_bwd(Tensor grad, {_DENSE}, {_SHAPE}, bool needs_storage) -> Tensor[]")


def _check_ring(storage, scales, sigmas, cursor, count, sigma):
    check_tensor("storage", storage, ("capacity", "B", "T", "D"), STORED_DTYPES)
    capacity, batch, tokens, _ = storage.shape
    on = storage.device
    if storage.dtype == torch.float8_e4m3fn:
        remedy = "Pass the `scales` of the ring."
        check_tensor("scales", scales, (capacity, batch, tokens), (torch.float32,), on, remedy)
    elif scales is not None:
        remedy = "Scales belong to a ring of float8_e4m3fn."
        raise argument_error("scales", "be None for this dtype of `storage`", scales, remedy)
    check_tensor("sigmas", sigmas, (capacity, batch), (torch.float32,), on)
    check_tensor("cursor", cursor, (batch,), (torch.int32,), on)
    check_tensor("count", count, (batch,), (torch.int32,), on)
    check_tensor("sigma", sigma, (batch,), (torch.float32, torch.float64), on)


def _check_history(storage, stage_bounds, history_length):
    if any(not a > b for a, b in zip(stage_bounds, stage_bounds[1:])):
        must = "fall strictly, from high to low noise"
        raise argument_error("stage_bounds", must, stage_bounds, "Sort and deduplicate them.")
    if len(history_length) != len(stage_bounds) + 1:
        raise argument_error(
            "history_length",
            f"have one entry per stage, {len(stage_bounds) + 1}",
            history_length,
            "Pass as many as `stage_bounds` has entries and one more.",
        )
    for length in history_length:
        check_int("history_length", length)
    if max(history_length) > storage.shape[0]:
        raise argument_error(
            "history_length",
            f"be at most the ring's capacity, {storage.shape[0]}",
            history_length,
            "Make the ring as large as the longest history.",
        )


def _check_experts(device, tensors):
    sizes = {}  # of the dimensions that have a name; its first appearance decides
    for name, value, shape in tensors:
        shape = tuple(sizes.get(size, size) for size in shape)
        check_tensor(name, value, device=device, remedy="Move the predictor to the ring's device.")
        check_tensor(name, value, shape, FLOAT_DTYPES)
        sizes.update((size, n) for size, n in zip(shape, value.shape) if isinstance(size, str))


def _check_tensors(names, values):
    """Raises `TypeError` unless the values are tensors, or None where that is allowed."""
    for name, value in zip(names, values):
        if not (value is None and name in _OPTIONAL):
            check_tensor(name, value)


def _newton_fits(state, experts, stage_bounds, history_length, coefficients) -> bool:
    """Whether the arguments are what `_check_newton` demands, found out fast. False means: look closer."""
    storage, scales, *state = state
    in_weight, down = experts[0], experts[5]
    if torch.compiler.is_compiling() or scales is not None or storage.ndim != 4 or in_weight.ndim != 3:
        return False
    capacity, batch, _, width = storage.shape
    sizes = (capacity, batch, width, in_weight.shape[1], None if down is None else down.shape[1], coefficients)
    shapes = _newton_shapes(tuple(stage_bounds), tuple(history_length), *sizes)
    tensors, device = [tensor for tensor in (*state, *experts) if tensor is not None], storage.device
    return (
        tuple([tensor.shape for tensor in tensors]) == shapes
        and all([tensor.device == device for tensor in tensors])
        and tuple([tensor.dtype for tensor in state]) == _STATE_DTYPES
        and all([tensor.dtype in FLOAT_DTYPES for tensor in tensors[4:]])
        and storage.dtype in FLOAT_DTYPES
        and {*map(type, history_length)} == {int}  # 2.0 finds the shapes of 2
    )


@functools.lru_cache(maxsize=64)
def _newton_shapes(stage_bounds, history_length, capacity, batch, width, hidden, rank, coefficients):
    """The shapes that the tensors of a newton forecast must have, but for `storage`; None where no shapes are right."""
    stages, taps = len(stage_bounds) + 1, max(history_length) - 1
    falls = all(a > b for a, b in zip(stage_bounds, stage_bounds[1:]))
    if not falls or len(history_length) != stages or not 1 <= min(history_length) <= taps + 1 <= capacity:
        return None
    shapes = [(capacity, batch), (batch,), (batch,), (batch,)]
    shapes += [(stages, hidden, taps + 2), (stages, hidden), (stages, hidden, coefficients)]
    shapes += [(stages, taps, width, hidden), (stages, taps, width)]
    if rank is not None:
        shapes += [(stages, rank, taps, width), (stages, width, rank), (stages, width)]
    return tuple(shapes)


def _check_newton(
    storage, scales, sigmas, cursor, count, sigma, in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias,
    stage_bounds, history_length, grid_size, spline_order,
):  # fmt: skip
    experts = (in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    state = (storage, scales, sigmas, cursor, count, sigma)
    if _newton_fits(state, experts, stage_bounds, history_length, grid_size + spline_order):
        return
    _check_ring(*state)
    _check_history(storage, stage_bounds, history_length)
    stages, taps, width = len(stage_bounds) + 1, max(history_length) - 1, storage.shape[3]
    experts = [
        ("in_weight", in_weight, (stages, "M", taps + 2)),
        ("in_bias", in_bias, (stages, "M")),
        ("spline", spline, (stages, "M", grid_size + spline_order)),
        ("out_weight", out_weight, (stages, taps, width, "M")),
        ("out_bias", out_bias, (stages, taps, width)),
    ]
    if down is not None:
        experts += [
            ("down", down, (stages, "R", taps, width)),
            ("up", up, (stages, width, "R")),
            ("up_bias", up_bias, (stages, width)),
        ]
    _check_experts(storage.device, experts)


def _check_dense(
    storage, scales, sigmas, cursor, count, sigma, in_weight, in_bias, spline, out_weight, out_bias, mix_weight,
    mix_bias, stage_bounds, history_length, grid_size, spline_order,
):  # fmt: skip
    _check_ring(storage, scales, sigmas, cursor, count, sigma)
    _check_history(storage, stage_bounds, history_length)
    stages, width = len(stage_bounds) + 1, storage.shape[3]
    experts = [
        ("in_weight", in_weight, (stages, "M", max(history_length))),
        ("in_bias", in_bias, (stages, "M")),
        ("spline", spline, (stages, "M", grid_size + spline_order)),
        ("out_weight", out_weight, (stages, "M")),
        ("out_bias", out_bias, (stages,)),
        ("mix_weight", mix_weight, (sum(history_length), width, width)),
        ("mix_bias", mix_bias, (stages, width)),
    ]
    _check_experts(storage.device, experts)


def _check_kernels(storage):
    """Raises `ValueError` unless the channels of a token follow each other, as compiled code reads them."""
    if storage.stride(3) != 1 and storage.shape[3] > 1:
        got = Said(f"strides {list(storage.stride())}")
        raise argument_error("storage", "have a last stride of 1", got, "Pass `storage.contiguous()`.")


def _check_head(features, head):
    """Checks the head of features `[..., B, T, D]`."""
    batch, _, width = features.shape[-3:]
    device = features.device
    check_tensor("head.weight", head.weight, ("O", width), FLOAT_DTYPES, device)
    check_tensor("head.scale", head.scale, (batch, width), FLOAT_DTYPES, device)
    check_tensor("head.shift", head.shift, (batch, width), FLOAT_DTYPES, device)
    if head.bias is not None:
        check_tensor("head.bias", head.bias, (head.weight.shape[0],), FLOAT_DTYPES, device)


def _needs_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _has_kernels(storage, sigmas, sigma, spline_order, *others) -> bool:
    """Whether Triton's kernels are made for such arguments: not for float64, high degrees and gradients of sigmas."""
    tensors = (storage, *(tensor for tensor in others if tensor is not None))
    return (
        all(tensor.dtype != torch.float64 for tensor in tensors)
        and TRITON_ORDERS[0] <= spline_order <= TRITON_ORDERS[1]
        and (storage.stride(3) == 1 or storage.shape[3] == 1)
        and not _needs_gradient(sigmas, sigma)
    )


def newton_predict(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Forecasts features by KAN-modulated Newton extrapolation from the newest anchors of a ring.

    With the anchors `(s_0, g_0), (s_1, g_1), ...`, newest first, and the Newton taps
    `t_j = D_j * prod_{q<j} (sigma - s_q)` over their divided differences `D_j`:

        u     = tanh(in_weight @ z + in_bias)                                     [M]
        c     = out_weight @ (spline(u) + silu(u)) + out_bias                     [K - 1, D]
        h_hat = g_0 + sum_j c_j * t_j  (+ up @ (down @ [t_1; ...]) + up_bias)

    where `z` holds `5 * (sigma - s_k)` for each anchor, 0 for a missing one, and `2 * sigma - 1`. Taps that need a
    missing anchor are zero. A row with no anchor at all is NaN. The tanh, the SiLU and the factor 5 are this project's
    choices: the tanh keeps the inputs of the splines on their grid, and the factor spreads usual gaps over it.

    Args:
        storage, scales, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B, T]` for float8
            and None otherwise, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast; chooses each sample's stage.
        in_weight, in_bias: `[S, M, K + 1]`, `[S, M]`, into the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, their coefficients.
        out_weight, out_bias: `[S, K - 1, D, M]`, `[S, K - 1, D]`.
        down, up, up_bias: `[S, R, K - 1, D]`, `[S, D, R]`, `[S, D]`, the low-rank residual, or None.
        stage_bounds: S - 1 falling noise levels.
        history_length: anchors read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto", "triton", "extension" (on a CPU, without gradients) or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`, bfloat16 for float8; computed in float32. Triton rounds what it
        multiplies for a residual to the dtype of `storage` (bfloat16 for float8, and in the backward for float16, whose
        range is too small), and the forecast once before the residual is added.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; named.
        RuntimeError: the backend asked for can't run.

    Equivalent to, for a sample b that has an anchor::

        stage = int((sigma[b] <= torch.tensor(stage_bounds)).sum())
        n = min(history_length[stage], int(count[b]))  # anchors that are read
        slots = (cursor[b] - 1 - torch.arange(n)) % len(storage)
        s, g = sigmas[slots, b], storage[slots, b]  # [n], [n, T, D]
        z = torch.zeros(in_weight.shape[2])
        z[:n], z[-1] = 5 * (sigma[b] - s), 2 * sigma[b] - 1
        u = torch.tanh(in_weight[stage] @ z + in_bias[stage])
        c = out_weight[stage] @ (bspline_evaluate(u, spline[stage], grid_size, spline_order) + F.silu(u))
        c = c + out_bias[stage]
        h_hat = g[0] if up is None else g[0] + up_bias[stage]
        for j in range(1, n):
            g = (g[:-1] - g[1:]) / (s[:-j] - s[j:])[:, None, None]  # divided differences of order j
            tap = g[0] * (sigma[b] - s[:j]).prod()
            h_hat = h_hat + c[j - 1] * tap
            if up is not None:
                h_hat = h_hat + tap @ down[stage, :, j - 1].T @ up[stage].T

    Source: Newton's divided differences, with coefficients learned as in LESA (arXiv 2602.20497).
    """
    state = (storage, scales, sigmas, cursor, count, sigma)
    experts = (in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    shape = (stage_bounds, history_length, grid_size, spline_order)
    _check_tensors(_NEWTON_TENSORS, (*state, *experts))
    chosen = newton_backend(*state, *experts, spline_order, backend, "newton_predict")
    if chosen != "torch":
        return torch.ops.lesa_kernels.newton_predict(*state, *experts, *shape, chosen)
    _check_newton(*state, *experts, *shape)
    return newton_predict_ref(*state, *experts, *shape)


def newton_backend(
    storage, scales, sigmas, cursor, count, sigma, in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias,
    spline_order, backend, operation,
) -> str:  # fmt: skip
    """The backend on which `newton_predict` or `newton_velocity` runs with these arguments, as `resolve_backend`."""
    experts = (in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    names = ("torch",)
    if _has_kernels(storage, sigmas, sigma, spline_order, *experts):
        if storage.device.type == "cpu" and scales is None and not _needs_gradient(storage, *experts):
            names = ("extension", *names)
        names = ("triton", *names)
    return resolve_backend(backend, storage, names, operation)


def _newton_predict(*args):
    *args, backend = args
    check_choice("backend", backend, ("triton", "extension"))
    _check_newton(*args)
    storage, *others = args
    _check_kernels(storage)
    if backend == "extension":
        if storage.device.type != "cpu":
            remedy = 'Pass backend="triton".'
            raise argument_error("storage", "be on the CPU for the compiled extension", storage, remedy)
        from lesa_kernels.predictor.extension import newton_predict_extension

        return newton_predict_extension(storage, *others)
    from lesa_kernels.predictor.kernels.newton import newton_predict_fwd

    return newton_predict_fwd(storage, *_contiguous(others), forecast_dtype(storage.dtype))


def _newton_predict_bwd(grad, storage, *others):
    from lesa_kernels.predictor.kernels.newton import newton_predict_bwd

    *others, needs_storage = others
    gradients = newton_predict_bwd(grad, storage, *_contiguous(others), needs_storage)
    return _as_declared(gradients, _newton_differentiable(storage, *others), needs_storage)


def _newton_differentiable(storage, scales, sigmas, cursor, count, sigma, *others):
    return (storage, *others[:8])


def _contiguous(arguments):
    return [value.contiguous() if isinstance(value, torch.Tensor) else value for value in arguments]


def _as_declared(gradients, inputs, needs_storage) -> list[torch.Tensor]:
    """One tensor for each differentiable input, in its dtype, as an operator must return them; empty for what has none.

    An input that nothing depends on, such as a residual over no taps, has a gradient of zeros.
    """
    declared = []
    for index, (gradient, value) in enumerate(zip(gradients, inputs)):
        if value is None or (index == 0 and not needs_storage):
            declared.append(inputs[0].new_empty(0, dtype=torch.float32))
        elif gradient is None:
            declared.append(torch.zeros_like(value, memory_format=torch.contiguous_format))
        else:
            declared.append(gradient.to(value.dtype).contiguous())
    return declared


def _fake_gradients(inputs, needs_storage):
    return [
        inputs[0].new_empty(0, dtype=torch.float32)
        if value is None or (index == 0 and not needs_storage)
        else value.new_empty(value.shape)
        for index, value in enumerate(inputs)
    ]


def _fake_forecast(storage, *_):
    return storage.new_empty(storage.shape[1:], dtype=forecast_dtype(storage.dtype))


def newton_velocity(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    head: OutputHead,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> torch.Tensor:
    """A whole skipped step: Newton's forecast and the output head applied to it, without the forecast in memory.

    On Triton this is one kernel that reads each anchor once and writes the velocities. It is made for heads of up to
    256 outputs, and takes scratch memory of about `4 B T ceil(D / BLOCK_D) (O + 2 R + 2)` bytes, of a GiB at most.
    Other backends, larger sizes and calls that need a gradient forecast first and apply the head to the result.

    Args:
        head: the head's weights and this step's modulation.
        storage ... spline_order: as in `newton_predict`.
        backend: as in `newton_predict`.

    Returns:
        `[B, T, O]` in the dtype of `storage` (bfloat16 for float8); computed in float32, but for matrix products, whose
        operands Triton rounds to the dtype of `storage`.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than it should; named.
        RuntimeError: the backend asked for can't run.

    Equivalent to::

        velocity = output_head(newton_predict(...), head)

    Source: the rearrangement of LayerNorm and projection around a low-rank sum is this project's.
    """
    state = (storage, scales, sigmas, cursor, count, sigma)
    experts = (in_weight, in_bias, spline, out_weight, out_bias, down, up, up_bias)
    shape = (stage_bounds, history_length, grid_size, spline_order)
    _check_tensors(_NEWTON_TENSORS, (*state, *experts))
    check_tensor("head.weight", head.weight, ("O", "D"))
    parts = (head.weight, head.bias, head.scale, head.shift)
    chosen = newton_backend(*state, *experts, spline_order, backend, "newton_velocity")
    if chosen == "torch":
        _check_newton(*state, *experts, *shape)
        _check_head(storage, head)
        return newton_velocity_ref(*state, *experts, head, *shape)
    if chosen == "triton" and not _needs_gradient(storage, *experts, *parts):
        return torch.ops.lesa_kernels.newton_velocity(*state, *experts, *parts, head.eps, *shape)
    return output_head(newton_predict(*state, *experts, *shape, backend=chosen), head)


def newton_velocity_is_fused(storage: torch.Tensor, down: torch.Tensor | None, head: OutputHead) -> bool:
    """Whether the operator `newton_velocity` is one kernel for these: see there for what it is made for."""
    from lesa_kernels.predictor.kernels.velocity import VelocityLaunch

    launch = VelocityLaunch.of(storage, head.weight, down)
    narrow = all(
        part is None or part.dtype != torch.float64 for part in (head.weight, head.bias, head.scale, head.shift)
    )
    return narrow and launch.outs <= KERNEL_HEAD_OUTPUTS and 4 * sum(launch.scratch) <= KERNEL_SCRATCH_BYTES


def _newton_velocity(*args):
    state_and_experts, parts, shape = args[:14], args[14:19], args[19:]
    head = OutputHead(*parts)
    _check_newton(*state_and_experts, *shape)
    storage, *others = state_and_experts
    _check_kernels(storage)
    _check_head(storage, head)
    out_dtype = forecast_dtype(storage.dtype)
    if not newton_velocity_is_fused(storage, state_and_experts[11], head):
        from lesa_kernels.predictor.kernels.newton import newton_predict_fwd

        return output_head_ref(newton_predict_fwd(storage, *_contiguous((*others, *shape)), out_dtype), head)
    from lesa_kernels.predictor.kernels.velocity import newton_velocity_fwd

    others = _contiguous((*others, head.weight, head.bias))
    # Rows of the modulation may be apart, as halves of what one projection gives are.
    rows = (part if part.stride(1) == 1 else part.contiguous() for part in (head.scale, head.shift))
    return newton_velocity_fwd(storage, *others, *rows, head.eps, *shape, out_dtype)


def _fake_velocity(storage, *args):
    weight = args[13]
    return storage.new_empty((*storage.shape[1:3], len(weight)), dtype=forecast_dtype(storage.dtype))


def dense_predict(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    sigma: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor,
    spline: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    mix_weight: torch.Tensor,
    mix_bias: torch.Tensor,
    stage_bounds: tuple[float, ...],
    history_length: tuple[int, ...],
    grid_size: int,
    spline_order: int,
    backend: str = "auto",
) -> torch.Tensor:
    """Forecasts features by the LESA paper's expert: a linear map over the history, scaled by a KAN of time offsets.

    With the history `g_0, ..., g_{K-1}`, newest first:

        u     = tanh(in_weight @ z + in_bias)                                     [M]
        alpha = out_weight . (spline(u) + silu(u)) + out_bias                     scalar
        h_hat = g_0 + alpha * (sum_k mix_weight_k @ g_k + mix_bias)

    where `z` holds `5 * (sigma - s_k)`, 0 for a missing entry. A missing entry repeats the oldest feature. A row with
    no history at all is NaN. The tanh, the SiLU and the factor 5 are this project's choices, as in `newton_predict`.

    Args:
        storage, scales, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B, T]` for float8
            and None otherwise, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast; chooses each sample's stage.
        in_weight, in_bias: `[S, M, K]`, `[S, M]`, into the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, their coefficients.
        out_weight, out_bias: `[S, M]`, `[S]`.
        mix_weight: `[sum(history_length), D, D]`, the maps of all stages one after the other, newest entry first.
        mix_bias: `[S, D]`.
        stage_bounds: S - 1 falling noise levels.
        history_length: entries read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto", "triton" or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`, bfloat16 for float8; computed in float32, but Triton rounds what it
        multiplies to the dtype of `storage`, bfloat16 for float8.

    Raises:
        ValueError, TypeError: a tensor has another shape, dtype or device than above; named.
        RuntimeError: the backend asked for can't run.

    Equivalent to, for a sample b that has a history::

        stage = int((sigma[b] <= torch.tensor(stage_bounds)).sum())
        K, n = history_length[stage], int(count[b])
        slots = (cursor[b] - 1 - torch.arange(K).clamp(max=n - 1)) % len(storage)
        z = torch.zeros(in_weight.shape[2])
        z[: min(K, n)] = 5 * (sigma[b] - sigmas[slots, b])[:n]
        u = torch.tanh(in_weight[stage] @ z + in_bias[stage])
        alpha = out_weight[stage] @ (bspline_evaluate(u, spline[stage], grid_size, spline_order) + F.silu(u))
        alpha = alpha + out_bias[stage]
        g, first = storage[slots, b], sum(history_length[:stage])
        mixed = torch.einsum("kod,ktd->to", mix_weight[first : first + K], g)
        h_hat = g[0] + alpha * (mixed + mix_bias[stage])

    Source: LESA, arXiv 2602.20497.
    """
    state = (storage, scales, sigmas, cursor, count, sigma)
    experts = (in_weight, in_bias, spline, out_weight, out_bias, mix_weight, mix_bias)
    shape = (stage_bounds, history_length, grid_size, spline_order)
    _check_tensors(_DENSE_TENSORS, (*state, *experts))
    backends = ("triton", "torch") if _has_kernels(storage, sigmas, sigma, spline_order, *experts) else ("torch",)
    if resolve_backend(backend, storage, backends, "dense_predict") == "triton":
        return torch.ops.lesa_kernels.dense_predict(*state, *experts, *shape)
    _check_dense(*state, *experts, *shape)
    return dense_predict_ref(*state, *experts, *shape)


def _dense_predict(*args):
    _check_dense(*args)
    _check_kernels(args[0])
    from lesa_kernels.predictor.kernels.dense import dense_predict_fwd

    storage, *others = args
    return dense_predict_fwd(storage, *_contiguous(others), forecast_dtype(storage.dtype))


def _dense_predict_bwd(grad, storage, *others):
    from lesa_kernels.predictor.gradients import HiddenUnits, coefficients_backward, read_history
    from lesa_kernels.predictor.kernels.dense import dense_predict_bwd

    *others, needs_storage = others
    others = _contiguous(others)
    (sigmas, cursor, count, sigma), (in_weight, in_bias, spline, out_weight) = others[1:5], others[5:9]
    stage_bounds, history_length, grid_size, spline_order = others[12:]
    of_mix, of_mix_bias, of_alpha, of_storage = dense_predict_bwd(grad, storage, *others, needs_storage)
    history = read_history(sigmas, cursor, count, sigma, stage_bounds, history_length)
    hidden = HiddenUnits(history, in_weight, in_bias, spline, grid_size, spline_order)
    of_hidden, of_out, of_bias = coefficients_backward(history, hidden, out_weight[:, None], of_alpha[:, None])
    of_kan = (*hidden.backward(of_hidden), of_out[:, 0], of_bias[:, 0])
    inputs = _dense_differentiable(storage, *others)
    return _as_declared((of_storage, *of_kan, of_mix, of_mix_bias), inputs, needs_storage)


def _dense_differentiable(storage, scales, sigmas, cursor, count, sigma, *others):
    return (storage, *others[:7])


def output_head(features: torch.Tensor, head: OutputHead, backend: str = "auto") -> torch.Tensor:
    """Applies a transformer's output head to features: AdaLN, then the projection.

    Args:
        features: `[B, T, D]`.
        head: weights and this step's modulation.
        backend: "auto" or "torch".

    Returns:
        `[B, T, O]` in the dtype of `features`; computed in float32.

    Raises:
        ValueError, TypeError: a tensor of `head` has another shape, device or dtype; named.
        RuntimeError: the backend asked for can't run.

    Equivalent to::

        normed = F.layer_norm(features, features.shape[-1:], eps=head.eps)
        velocity = F.linear(normed * (1 + head.scale[:, None]) + head.shift[:, None], head.weight, head.bias)
    """
    check_tensor("features", features, ("B", "T", "D"), FLOAT_DTYPES)
    resolve_backend(backend, features, ("torch",), "output_head")
    _check_head(features, head)
    return output_head_ref(features, head)


def _register(name, kernel, fake) -> None:
    def on_cpu(*args):
        with torch.autocast("cpu", enabled=False):  # dtypes are as the operation says
            return kernel(*args)

    def on_gpu(*args):
        # Triton launches on the current GPU.
        with torch.cuda.device(args[0].device), torch.autocast("cuda", enabled=False):
            return kernel(*args)

    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"lesa_kernels::{name}", fake, lib=_LIBRARY)


def _register_gradient(name, differentiable, first_unused: int) -> None:
    """Gives the operator `name` the gradient that `<name>_bwd` computes.

    Args:
        name: of the operator.
        differentiable: picks the inputs that have gradients, the storage first, from all inputs.
        first_unused: how many inputs the backward takes too.
    """

    def setup_context(ctx, inputs, output):
        ctx.rest = [value if not isinstance(value, torch.Tensor) else None for value in inputs[:first_unused]]
        ctx.at = [i for i, value in enumerate(inputs[:first_unused]) if isinstance(value, torch.Tensor)]
        ctx.count = len(inputs)
        ctx.save_for_backward(*(inputs[i] for i in ctx.at))

    def backward(ctx, grad):
        inputs = list(ctx.rest)
        for i, tensor in zip(ctx.at, ctx.saved_tensors):
            inputs[i] = tensor
        gradients = getattr(torch.ops.lesa_kernels, f"{name}_bwd")(grad, *inputs, ctx.needs_input_grad[0])
        places = differentiable(*range(first_unused))
        result = [None] * ctx.count
        for place, gradient in zip(places, gradients):
            if ctx.needs_input_grad[place]:
                result[place] = gradient
        return tuple(result)

    torch.library.register_autograd(f"lesa_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    _register_no_gradient(f"{name}_bwd", "has no second derivatives")


def _register_no_gradient(name, why) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(f'{name} on Triton {why}. Choose backend="torch" for them.')

    torch.library.register_autograd(f"lesa_kernels::{name}", backward, lib=_LIBRARY)


def _fake_newton_gradients(grad, *args):
    return _fake_gradients(_newton_differentiable(*args), args[-1])


def _fake_dense_gradients(grad, *args):
    return _fake_gradients(_dense_differentiable(*args), args[-1])


_register("newton_predict", _newton_predict, _fake_forecast)
_register("newton_predict_bwd", _newton_predict_bwd, _fake_newton_gradients)
_register("newton_velocity", _newton_velocity, _fake_velocity)
_register("dense_predict", _dense_predict, _fake_forecast)
_register("dense_predict_bwd", _dense_predict_bwd, _fake_dense_gradients)
_register_gradient("newton_predict", _newton_differentiable, 18)
_register_gradient("dense_predict", _dense_differentiable, 17)
_register_no_gradient("newton_velocity", "has no gradients: `newton_velocity()` takes other operators for them")
