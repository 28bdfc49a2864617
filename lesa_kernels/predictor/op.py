"""The public functions: which implementation runs is decided here."""

import torch

from lesa_kernels._checks import argument_error, check_tensor
from lesa_kernels._dispatch import resolve_backend
from lesa_kernels.predictor.reference import OutputHead, dense_predict_ref, newton_predict_ref, output_head_ref

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_ring(storage, sigmas, cursor, count, sigma):
    check_tensor("storage", storage, ("capacity", "B", "T", "D"), FEATURE_DTYPES)
    capacity, batch = storage.shape[:2]
    on = storage.device
    check_tensor("sigmas", sigmas, (capacity, batch), (torch.float32,), on)
    check_tensor("cursor", cursor, (batch,), (torch.int32,), on)
    check_tensor("count", count, (batch,), (torch.int32,), on)
    check_tensor("sigma", sigma, (batch,), (torch.float32, torch.float64), on)


def _check_history(storage, stage_bounds, history_length):
    if len(history_length) != len(stage_bounds) + 1:
        raise argument_error(
            "history_length",
            f"have one entry per stage, {len(stage_bounds) + 1}",
            history_length,
            "Pass as many as `stage_bounds` has entries and one more.",
        )
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
        check_tensor(name, value, shape)
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

        c     = out_weight @ phi(tanh(in_weight @ z + in_bias)) + out_bias        [K - 1, D]
        h_hat = g_0 + sum_j c_j * t_j  (+ up @ (down @ [t_1; ...]) + up_bias)

    where `z` holds `5 * (sigma - s_k)` for each anchor, 0 for a missing one, and `2 * sigma - 1`. Taps that need a
    missing anchor are zero. A row with no anchor at all is NaN.

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

    Equivalent to `newton_predict_ref`. Source: Newton's divided differences, with coefficients learned as in LESA
    (arXiv 2602.20497).
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

        alpha = out_weight . phi(tanh(in_weight @ z + in_bias)) + out_bias        scalar
        h_hat = g_0 + alpha * (sum_k mix_weight_k @ g_k + mix_bias)

    where `z` holds `5 * (sigma - s_k)`, 0 for a missing entry. A missing entry repeats the oldest feature. A row with
    no history at all is NaN.

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

    Equivalent to `dense_predict_ref`. Source: LESA, arXiv 2602.20497.
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
        ValueError, TypeError: a tensor of `head` has another shape or device; named.

    Equivalent to `F.linear(F.layer_norm(features) * (1 + scale) + shift, weight, bias)`.
    """
    check_tensor("features", features, ("B", "T", "D"), FEATURE_DTYPES)
    resolve_backend(backend, features, ("torch",), "output_head")
    batch, _, width = features.shape
    check_tensor("head.weight", head.weight, ("O", width), device=features.device)
    check_tensor("head.scale", head.scale, (batch, width), device=features.device)
    check_tensor("head.shift", head.shift, (batch, width), device=features.device)
    if head.bias is not None:
        check_tensor("head.bias", head.bias, (head.weight.shape[0],), device=features.device)
    return output_head_ref(features, head)
