"""The public functions: which implementation runs is decided here."""

import torch

from lesa_kernels._checks import argument_error, check_int, check_tensor
from lesa_kernels._dispatch import resolve_backend
from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.predictor.reference import OutputHead, dense_predict_ref, newton_predict_ref, output_head_ref


def _check_ring(storage, sigmas, cursor, count, sigma):
    check_tensor("storage", storage, ("capacity", "B", "T", "D"), FLOAT_DTYPES)
    capacity, batch = storage.shape[:2]
    on = storage.device
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


def newton_predict(
    storage: torch.Tensor,
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
        storage, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast; chooses each sample's stage.
        in_weight, in_bias: `[S, M, K + 1]`, `[S, M]`, into the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, their coefficients.
        out_weight, out_bias: `[S, K - 1, D, M]`, `[S, K - 1, D]`.
        down, up, up_bias: `[S, R, K - 1, D]`, `[S, D, R]`, `[S, D]`, the low-rank residual, or None.
        stage_bounds: S - 1 falling noise levels.
        history_length: anchors read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto" or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`; computed in float32.

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
    _check_ring(storage, sigmas, cursor, count, sigma)
    resolve_backend(backend, storage, ("torch",), "newton_predict")
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
    kan = (in_weight, in_bias, spline, out_weight, out_bias)
    shape = (stage_bounds, history_length, grid_size, spline_order)
    return newton_predict_ref(storage, sigmas, cursor, count, sigma, *kan, down, up, up_bias, *shape)


def dense_predict(
    storage: torch.Tensor,
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
        storage, sigmas, cursor, count: the buffers of a `FeatureRing`: `[C, B, T, D]`, `[C, B]`, `[B]`, `[B]`.
        sigma: `[B]`, the noise level to forecast; chooses each sample's stage.
        in_weight, in_bias: `[S, M, K]`, `[S, M]`, into the spline units of the S experts.
        spline: `[S, M, grid_size + spline_order]`, their coefficients.
        out_weight, out_bias: `[S, M]`, `[S]`.
        mix_weight: `[sum(history_length), D, D]`, the maps of all stages one after the other, newest entry first.
        mix_bias: `[S, D]`.
        stage_bounds: S - 1 falling noise levels.
        history_length: entries read in each stage, S ints; K is the largest.
        grid_size, spline_order: of the splines on [-1, 1].
        backend: "auto" or "torch".

    Returns:
        `[B, T, D]` in the dtype of `storage`; computed in float32.

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
    _check_ring(storage, sigmas, cursor, count, sigma)
    resolve_backend(backend, storage, ("torch",), "dense_predict")
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
    kan = (in_weight, in_bias, spline, out_weight, out_bias)
    shape = (stage_bounds, history_length, grid_size, spline_order)
    return dense_predict_ref(storage, sigmas, cursor, count, sigma, *kan, mix_weight, mix_bias, *shape)


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
    batch, _, width = features.shape
    check_tensor("head.weight", head.weight, ("O", width), FLOAT_DTYPES, features.device)
    check_tensor("head.scale", head.scale, (batch, width), FLOAT_DTYPES, features.device)
    check_tensor("head.shift", head.shift, (batch, width), FLOAT_DTYPES, features.device)
    if head.bias is not None:
        check_tensor("head.bias", head.bias, (head.weight.shape[0],), FLOAT_DTYPES, features.device)
    return output_head_ref(features, head)
