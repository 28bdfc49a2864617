"""What a day on a GPU measures: forecasts, whole steps, pushes and layers, each beside float64 and plain torch."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from bench_kan import PEERS, Setting, least_work
from bench_predictor import SIGMAS, TARGET, DensePeer, random_head, random_predictor
from shapes import FLUX, HUNYUAN_VIDEO, LAYERS, FeatureShape, LayerShape

from lesa_kernels import FeatureRing, FusedKANPredictor, newton_coefficients, output_head, work
from lesa_kernels.feature_ring.reference import dequantise_float8
from lesa_kernels.predictor.reference import newton_coefficients_ref
from lesa_kernels.stream import OutputHead, head_sums

OUT_CHANNELS = 64
STEPS = 32  # predicted ones of a run, whose weights are made at once
SCALES = (1, 2, 4, 8)
FLOAT8 = torch.float8_e4m3fn
TINY = FeatureShape("tiny", 1, 10, 32, torch.float32)
TINY_LAYERS = (LayerShape("kan-tiny", 40, 20, 24, torch.float32),)
SHAPES = {"cuda": {"flux": FLUX, "hunyuan": HUNYUAN_VIDEO}, "cpu": {"flux": TINY, "hunyuan": TINY}}


@dataclass(frozen=True)
class Case:
    """What is called, and what it is compared with.

    Args:
        call: is timed.
        exact: the result in float64.
        plain: the same in plain torch, in the dtype of the call; its error is the measure. None: a peer, which is not
            judged.
        least: bytes and FLOPs, as in `lesa_kernels.work`.
        dtype: of the products.
        result: what is compared; that of `call` if None.
    """

    call: Callable
    exact: Callable
    plain: Callable | None
    least: dict[str, int]
    dtype: torch.dtype
    result: Callable | None = None


@dataclass(frozen=True)
class Named:
    """A case that is yet to be made.

    Args:
        name: of the case.
        make: makes it.
        compiles: whether it calls kernels of Triton that are ours.
    """

    name: str
    make: Callable[[], Case]
    compiles: bool = True


class Newton:
    """A newton predictor with a full history, its twin in plain torch, and what a run prepares for a step.

    Args:
        shape: of the features.
        device: where.
        rank: of the residual.
        stored: dtype of the ring.
    """

    def __init__(self, shape: FeatureShape, device: torch.device, rank: int, stored: torch.dtype):
        torch.manual_seed(0)
        self.shape, self.rank = shape, rank
        self.predictor = random_predictor(shape, device, "newton", rank=rank).requires_grad_(False)
        self.twin = twin_of(self.predictor)
        self.ring = self.predictor.make_ring(shape.batch, shape.tokens, stored, device)
        for sigma in SIGMAS:
            self.ring.push(random_features(shape, device), sigma)
        self.head = random_head(shape, device)
        self.sigma = torch.full((shape.batch,), TARGET, device=device)
        (self.weights,) = self.predictor.plan([SIGMAS[::-1]], [TARGET], shape.batch)
        self.low_rank = self.predictor.low_rank(shape.dtype)
        self.sums = head_sums(self.head, self.low_rank, self.weights.stage)

    def exact_forecast(self) -> torch.Tensor:
        """In float64, from what the ring has stored."""
        wide, scales = copy.copy(self.ring), self.ring.scales
        stored = self.ring.storage.double() if scales is None else dequantise_float8(self.ring.storage, scales).double()
        wide.storage, wide.scales = stored, None
        return copy.deepcopy(self.twin).double()(wide, self.sigma)

    def exact_velocity(self) -> torch.Tensor:
        """The output head of `exact_forecast`, in float64."""
        head = OutputHead(*(getattr(self.head, name).double() for name in ("weight", "bias", "scale", "shift")))
        return output_head(self.exact_forecast(), head, backend="torch")

    def case(self, velocity: bool, in_run: bool) -> Case:
        """A forecast or a whole step: called alone, or with the weights that a run has made for it."""
        sizes = self.shape.batch, self.shape.tokens, self.shape.dim, self.ring.dtype
        # In a run the KAN has been evaluated before. A step reads A, about as much as if the KAN had no units.
        options = {"rank": self.rank, "hidden": 0 if in_run else self.predictor.config.hidden}
        state, sigma, prepared = self.ring, self.sigma, (self.weights, self.low_rank)
        if velocity:
            alone, plain = (
                partial(each.predict_velocity, state, sigma, self.head) for each in (self.predictor, self.twin)
            )
            planned = partial(self.predictor.velocity_with, state, self.weights, self.head, self.low_rank, self.sums)
            exact, least = self.exact_velocity, work.predict_velocity(*sizes, OUT_CHANNELS, **options)
        else:
            alone, plain = (partial(each, state, sigma) for each in (self.predictor, self.twin))
            planned = partial(self.predictor.forecast_with, state, *prepared)
            exact, least = self.exact_forecast, work.newton_predict(*sizes, **options)
        return Case(planned if in_run else alone, exact, plain, least, self.shape.dtype)


def random_features(shape: FeatureShape, device: torch.device) -> torch.Tensor:
    return torch.randn(shape.batch, shape.tokens, shape.dim, device=device).to(shape.dtype)


def twin_of(predictor: FusedKANPredictor) -> FusedKANPredictor:
    """The same predictor in plain torch."""
    twin = FusedKANPredictor(predictor.config, backend="torch")
    twin.to(predictor.in_weight.device, predictor.in_weight.dtype).load_state_dict(predictor.state_dict())
    return twin.requires_grad_(False)


def newton(shape: FeatureShape, device: torch.device, rank: int, stored: torch.dtype, velocity: bool, in_run: bool):
    """The case of that name; see `Newton`."""
    return Newton(shape, device, rank, stored).case(velocity, in_run)


def newton_name(rank: int, velocity: bool, in_run: bool) -> str:
    return f"{'velocity' if velocity else 'forecast'} {'in a run' if in_run else 'alone'}, rank {rank}"


def coefficients(shape: FeatureShape, device: torch.device, rank: int) -> Case:
    """The weights of all predicted steps of a run."""
    torch.manual_seed(0)
    predictor = random_predictor(shape, device, "newton", rank=rank).requires_grad_(False)
    config, experts = predictor.config, predictor.experts()
    later = 0.01 * torch.arange(STEPS, device=device, dtype=torch.float32)[:, None]  # [P, B]
    sigmas = torch.tensor(SIGMAS[::-1][: config.max_history], device=device) - later[:, :, None]
    count = torch.full((STEPS, 1), config.max_history, dtype=torch.int32, device=device)
    settings = (config.stage_bounds, config.lengths, config.grid_size, config.spline_order)
    arguments = (sigmas, count, TARGET - later, *experts, *settings)

    def made(**backend) -> torch.Tensor:
        return newton_coefficients(*arguments, **backend).anchors

    def exact() -> torch.Tensor:
        wide = type(experts)(*(None if value is None else value.double() for value in experts))
        return newton_coefficients_ref(*arguments[:3], wide, predictor.shape(), torch.float64).anchors

    moved = sum(value.nbytes for value in (*experts, *newton_coefficients(*arguments)) if value is not None)
    least = {"bytes": moved, "flops": 2 * STEPS * experts.out_weight[0].numel()}
    return Case(made, exact, partial(made, backend="torch"), least, torch.float32)


def push(shape: FeatureShape, device: torch.device, stored: torch.dtype) -> Case:
    """A push. Features and slots take turns, so that neither stays in the caches."""
    sizes = (4, shape.batch, shape.tokens, shape.dim, stored, device)
    rings = {backend: FeatureRing(*sizes, backend) for backend in ("auto", "torch")}
    features = [random_features(shape, device) for _ in range(4)]
    turns, levels = itertools.cycle(features), (1.0 - 1e-6 * i for i in itertools.count())

    def call() -> None:
        rings["auto"].push(next(turns), next(levels))

    def stored_by(backend: str) -> torch.Tensor:
        rings[backend].reset()
        rings[backend].push(features[0], 0.5)
        return rings[backend].gather()

    least = work.ring_push(*shape.sizes, stored)
    plain, result = partial(stored_by, "torch"), partial(stored_by, "auto")
    return Case(call, features[0].double, plain, least, shape.dtype, result)


def dense(shape: FeatureShape, device: torch.device, kind: str) -> Case:
    """The dense forecast, or one of its peers: the bare product, and what a user would write with it."""
    torch.manual_seed(0)
    with torch.no_grad():
        peer = DensePeer(shape, device)
    predictor, twin = peer.predictor.requires_grad_(False), twin_of(peer.predictor)
    wide = copy.copy(peer.ring)
    wide.storage = peer.ring.storage.double()
    sigma = torch.full((shape.batch,), TARGET, device=device)
    exact = partial(copy.deepcopy(twin).double(), wide, sigma)
    least = work.dense_predict(*shape.sizes, len(peer.features), parameter_bytes=shape.dtype.itemsize)
    if kind == "fused":
        return Case(partial(predictor, peer.ring, sigma), exact, partial(twin, peer.ring, sigma), least, shape.dtype)
    history = torch.cat(peer.features, 1)

    def call() -> torch.Tensor:
        if kind == "addmm":
            return torch.addmm(peer.bias, history, peer.maps)
        return peer.epilogue(torch.addmm(peer.bias, torch.cat(peer.features, 1), peer.maps))

    def result() -> torch.Tensor:
        return (peer.epilogue(call()) if kind == "addmm" else call()).view(peer.ring.storage.shape[1:])

    return Case(call, exact, None, least, shape.dtype, result)


def layer(shape, device: torch.device, implementation: str, gradients: bool) -> Case:
    """A KAN layer: forward, or with backward. "lesa" is ours; others are peers, as `bench_kan.py` names them."""
    setting = Setting(shape, device, implementation, gradients)
    plain = Setting(shape, device, "lesa-torch", gradients)
    least = work.bspline_kan(*least_work(shape))
    if gradients:
        least = work.both(least, work.bspline_kan_backward(*least_work(shape)))
        call, of_plain = setting.gradients, plain.gradients
    else:
        call, of_plain = setting.forward, plain.forward
    judged = of_plain if implementation == "lesa" else None
    return Case(call, lambda: tuple(setting.exact(gradients)), judged, least, setting.dtype)


def forecasts(shape: FeatureShape, device: torch.device) -> Iterator[Named]:
    """Every forecast, whole step and push at one size."""
    # The interpreter does not round to bfloat16 as a GPU does, and forecasts from float8 are bfloat16.
    kept = (shape.dtype, FLOAT8) if device.type == "cuda" else (shape.dtype,)
    for stored, rank, velocity, in_run in itertools.product(kept, (0, 32), (False, True), (False, True)):
        suffix = ", float8" if stored == FLOAT8 else ""
        make = partial(newton, shape, device, rank, stored, velocity, in_run)
        yield Named(newton_name(rank, velocity, in_run) + suffix, make)
    for rank in (0, 32):
        yield Named(f"coefficients of {STEPS} steps, rank {rank}", partial(coefficients, shape, device, rank))
    for stored in (shape.dtype, FLOAT8):
        yield Named(f"push to {str(stored).removeprefix('torch.')}", partial(push, shape, device, stored), False)


def tiles(shape: FeatureShape, device: torch.device) -> Iterator[Named]:
    """The same at one, two, four and eight times as many tokens."""
    for rank, (velocity, in_run) in itertools.product((0, 32), ((False, True), (True, True), (False, False))):
        for scale in SCALES:
            larger = replace(shape, tokens=shape.tokens * scale)
            make = partial(newton, larger, device, rank, shape.dtype, velocity, in_run)
            yield Named(f"{newton_name(rank, velocity, in_run)} x {scale}", make)


def products(shape: FeatureShape, device: torch.device) -> Iterator[Named]:
    """The dense forecast and its peers."""
    for kind in ("fused", "addmm", "concatenate, addmm, epilogue"):
        yield Named(kind, partial(dense, shape, device, kind), kind == "fused")


def layers(device: torch.device) -> Iterator[Named]:
    """The KAN layer and a peer: efficient-kan if it is in `peers/`, else the recursion over all bases."""
    peer = "efficient-kan" if (PEERS / "efficient-kan").is_dir() else "cox-de-boor"
    for shape in LAYERS["cuda"] if device.type == "cuda" else TINY_LAYERS:
        for gradients, implementation in itertools.product((False, True), ("lesa", peer)):
            name = f"{shape} {'forward and backward' if gradients else 'forward'}, {implementation}"
            yield Named(name, partial(layer, shape, device, implementation, gradients), implementation == "lesa")


def cases_of(part: str, device: torch.device) -> list[Named]:
    """The cases of a part."""
    shapes = SHAPES[device.type]
    if part == "kan":
        return list(layers(device))
    make = {"flux": forecasts, "hunyuan": forecasts, "tiles": tiles, "dense": products}[part]
    return list(make(shapes["hunyuan" if part == "hunyuan" else "flux"], device))
