"""The arguments of the stream operations as named tuples, and their checks.

A forecast is `h = sum_{k<n} A_k g_k + constant + V_s sum_j U_sj t_j` with the taps `t_j = sum_k w_jk g_k`. Here g_k are
the newest features of a ring, and s is the stage of the sample. Whoever forecasts makes A, the constant and w.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lesa_kernels.bspline_kan.reference import FLOAT_DTYPES
from lesa_kernels.checks import Said, argument_error, check_choice, check_tensor

STORED_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)
WEIGHT_DTYPES = (torch.float32, torch.float64)
NORMS = ("layer", "rms", None)


class StoredFeatures(NamedTuple):
    """The buffers of a `FeatureRing` that a forecast reads.

    Args:
        storage: `[C, B, T, D]`, the stored features.
        scales: `[C, B, T]` float32 for float8, else None.
        cursor: `[B]` int32.
        count: `[B]` int32.
    """

    storage: torch.Tensor
    scales: torch.Tensor | None
    cursor: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # replaces tuple.count, which is not used

    @property
    def device(self) -> torch.device:
        """Where the ring is."""
        return self.storage.device

    def check(self) -> None:
        """Raises `TypeError` or `ValueError` unless the buffers fit together."""
        check_tensor("storage", self.storage, ("capacity", "B", "T", "D"), STORED_DTYPES)
        capacity, batch, tokens, _ = self.storage.shape
        if self.storage.dtype == torch.float8_e4m3fn:
            remedy = "Pass the `scales` of the ring."
            check_tensor("scales", self.scales, (capacity, batch, tokens), (torch.float32,), self.device, remedy)
        elif self.scales is not None:
            remedy = "Scales belong to a ring of float8_e4m3fn."
            raise argument_error("scales", "be None for this dtype of `storage`", self.scales, remedy)
        check_tensor("cursor", self.cursor, (batch,), (torch.int32,), self.device)
        check_tensor("count", self.count, (batch,), (torch.int32,), self.device)

    def check_channels(self) -> None:
        """Raises `ValueError` unless the channels of a token are adjacent in memory, as compiled code reads them."""
        if self.storage.stride(3) != 1 and self.storage.shape[3] > 1:
            got = Said(f"strides {list(self.storage.stride())}")
            raise argument_error("storage", "have a last stride of 1", got, "Pass `storage.contiguous()`.")


class Weights(NamedTuple):
    """What a forecaster gives for one step. With a leading dimension P in each of them, it is for P steps.

    Args:
        anchors: `[B, K]` or `[B, K, D]` float32, the weight A of each of the K newest features, newest first; one
            number, or one for each channel. K is at most the ring's capacity.
        count: `[B]` int32, n, how many of them are read. A row is NaN if it is 0, or more than the ring has.
        constant: `[B]` or `[B, D]` float32, added to the sum, or None.
        taps: `[B, K - 1, K]` float32, the weights w of the features in each tap, or None without a residual. Tap j
            consists of the j + 2 newest features; weights of older ones are not read.
        stage: `[B]` int32, the row s of the residual, or None without a residual.
    """

    anchors: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]
    constant: torch.Tensor | None
    taps: torch.Tensor | None
    stage: torch.Tensor | None

    def check(self, features: StoredFeatures) -> None:
        """Raises `TypeError` or `ValueError` unless the weights fit the features, which are checked."""
        capacity, batch, _, width = features.storage.shape
        device = features.device
        per_channel = isinstance(self.anchors, torch.Tensor) and self.anchors.ndim == 3
        shape = (batch, "K", width) if per_channel else (batch, "K")
        check_tensor("weights.anchors", self.anchors, shape, WEIGHT_DTYPES, device)
        history = self.anchors.shape[1]
        if not 1 <= history <= capacity:
            must = f"have at least 1 and at most {capacity} weights for a ring of capacity {capacity}"
            raise argument_error("weights.anchors", must, self.anchors, "Make the ring as large as the history.")
        check_tensor("weights.count", self.count, (batch,), (torch.int32,), device)
        if self.constant is not None:
            wide = isinstance(self.constant, torch.Tensor) and self.constant.ndim == 2
            check_tensor("weights.constant", self.constant, (batch, width)[: 1 + wide], WEIGHT_DTYPES, device)
        if self.taps is not None:
            check_tensor("weights.taps", self.taps, (batch, history - 1, history), WEIGHT_DTYPES, device)
        if self.stage is not None:
            check_tensor("weights.stage", self.stage, (batch,), (torch.int32,), device)


class LowRank(NamedTuple):
    """The low-rank residual of all S stages; all None if there is none. J is the number of taps.

    Args:
        down, up: `[S, R, J, D]` and `[S, D, R]`, the maps U and V.
        square, total: `[S, R, R]` and `[S, R]` float32, `V^T V` and the sum of V over the channels. The fused output
            head needs them. If they are None, they are computed then.
    """

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    square: torch.Tensor | None = None
    total: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """R; zero if there is no residual, or if there are no taps for it to read."""
        return 0 if self.down is None or self.up is None or self.down.shape[2] == 0 else self.down.shape[1]

    def check(self, features: StoredFeatures, weights: Weights) -> None:
        """Raises `TypeError` or `ValueError` unless the maps fit the features and weights, which are checked."""
        if self.down is None and self.up is None:
            return
        width, device, taps = features.storage.shape[3], features.device, weights.anchors.shape[1] - 1
        down = check_tensor("low_rank.down", self.down, ("S", "R", taps, width), FLOAT_DTYPES, device)
        stages, rank = down.shape[:2]
        check_tensor("low_rank.up", self.up, (stages, width, rank), FLOAT_DTYPES, device)
        if self.square is not None:
            check_tensor("low_rank.square", self.square, (stages, rank, rank), WEIGHT_DTYPES, device)
        if self.total is not None:
            check_tensor("low_rank.total", self.total, (stages, rank), WEIGHT_DTYPES, device)
        if self.rank and (weights.taps is None or weights.stage is None):
            must = "come with `taps` and `stage` if there is a residual"
            got = Said("taps or stage None")
            raise argument_error("weights", must, got, "Pass `low_rank=NO_RESIDUAL`, or weights that were made for it.")


NO_RESIDUAL = LowRank()


def stream_fits(features: StoredFeatures, weights: Weights, low_rank: LowRank) -> bool:
    """Whether the checks of the three would surely find nothing wrong. Takes a fraction of their time."""
    storage, scales, *state = features
    given = (*state, *weights, *low_rank)
    if torch.compiler.is_compiling() or scales is not None:
        return False
    if not all([part is None or isinstance(part, torch.Tensor) for part in (storage, *given)]):
        return False
    if storage.dim() != 4 or weights.anchors is None or storage.dtype not in FLOAT_DTYPES:
        return False
    shapes = tuple([None if part is None else part.shape for part in given])
    device = storage.device
    return (
        _shapes_fit(storage.shape, shapes)
        and all([part is None or part.device == device for part in given])
        and all([part is None or part.dtype == torch.int32 for part in (*state, weights.count, weights.stage)])
        and all(
            [part is None or part.dtype in WEIGHT_DTYPES for part in (weights.anchors, weights.constant, weights.taps)]
        )
        and all([part is None or part.dtype in FLOAT_DTYPES for part in low_rank[:2]])
        and all([part is None or part.dtype in WEIGHT_DTYPES for part in low_rank[2:]])
    )


@functools.lru_cache(maxsize=64)
def _shapes_fit(storage: torch.Size, shapes: tuple[torch.Size | None, ...]) -> bool:
    """Whether the shapes of all tensors after `storage` are as the checks want them."""
    cursor, count, anchors, read, constant, taps, stage, down, up, square, total = shapes
    capacity, batch, _, width = storage
    if anchors is None or len(anchors) < 2 or not 1 <= (history := anchors[1]) <= capacity:
        return False
    if not (cursor == count == read == (batch,) and anchors in ((batch, history), (batch, history, width))):
        return False
    if constant not in (None, (batch,), (batch, width)) or taps not in (None, (batch, history - 1, history)):
        return False
    if down is None or up is None:
        return stage in (None, (batch,)) and down is up
    stages, rank = up[0], up[-1]
    return (
        stage == (batch,)
        and taps is not None
        and down == (stages, rank, history - 1, width)
        and up == (stages, width, rank)
        and square in (None, (stages, rank, rank))
        and total in (None, (stages, rank))
    )


@dataclass(frozen=True)
class OutputHead:
    """A transformer's output head: a norm without weights, a modulation, then a linear projection.

    The weights of an affine norm belong into the modulation: with weights w and b of the norm it is `w (1 + scale) - 1`
    in the place of `scale`, and `b (1 + scale) + shift` in that of `shift`.

    Args:
        weight: `[O, D]` of the projection.
        bias: `[O]` or None.
        scale: `[B, D]`, or `[B, T, D]` for one of each token; the modulation is `(1 + scale) * norm(h) + shift`.
        shift: like `scale`, or None for a head that only scales.
        eps: of the norm.
        norm: "layer" for a layer norm, "rms" for `h / sqrt(mean(h^2) + eps)`, or None for a head without a norm.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    shift: torch.Tensor | None
    eps: float = 1e-6
    norm: str | None = "layer"

    @property
    def per_token(self) -> bool:
        """Whether each token has a modulation of its own."""
        return isinstance(self.scale, torch.Tensor) and self.scale.ndim == 3

    def check(self, features: torch.Tensor) -> None:
        """Raises `TypeError` or `ValueError` unless the head fits features `[..., B, T, D]`."""
        check_choice("head.norm", self.norm, NORMS)
        batch, tokens, width = features.shape[-3:]
        device = features.device
        check_tensor("head.weight", self.weight, ("O", width), FLOAT_DTYPES, device)
        modulation = (batch, tokens, width) if self.per_token else (batch, width)
        check_tensor("head.scale", self.scale, modulation, FLOAT_DTYPES, device)
        if self.shift is not None:
            check_tensor("head.shift", self.shift, modulation, FLOAT_DTYPES, device)
        if self.bias is not None:
            check_tensor("head.bias", self.bias, (self.weight.shape[0],), FLOAT_DTYPES, device)


class HeadSums(NamedTuple):
    """What the result of a fused head needs once for each sample, see `head_sums`; all None: computed when needed.

    Args:
        ones: `[B, O]` float32, `weight @ (1 + scale)`.
        constant: `[B, O]` float32, `weight @ shift + bias`.
        through: `[B, R, O]` float32, `V^T diag(1 + scale) weight^T`, or None without a residual.
        weight: `[B, O + R, D]`, the rows of `weight diag(1 + scale)` and, with a residual, those of `V^T`, in the dtype
            of the features (bfloat16 for float8). In another one they are computed when needed.
    """

    ones: torch.Tensor | None = None
    constant: torch.Tensor | None = None
    through: torch.Tensor | None = None
    weight: torch.Tensor | None = None

    def check(self, head: OutputHead, low_rank: LowRank) -> None:
        """Raises `TypeError` or `ValueError` unless the sums fit the head and the residual, which are checked."""
        (batch, _), outputs = head.scale.shape, head.weight.shape[0]
        sizes = ((batch, outputs), (batch, outputs), (batch, low_rank.rank, outputs))
        for name, part, size in zip(self._fields, self, sizes):
            if part is not None and size[1]:  # without a residual, `through` is not read
                remedy = "Pass what `head_sums` gives for this head and residual, or `NO_SUMS`."
                check_tensor(f"sums.{name}", part, size, WEIGHT_DTYPES, head.weight.device, remedy)


NO_SUMS = HeadSums()
