"""Stands in for an adapter where there is none: finds out by watching a call where the features are."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_leaves, tree_map

from lesa.models.adapter import Adapter
from lesa.models.costs import Costs
from lesa.models.heads import HeadForm
from lesa.models.own_forward import OwnForward
from lesa.models.routes import Route, Unclear, WentElsewhere, find_route
from lesa.models.watching import Watch, block_lists, outside
from lesa_kernels.checks import Said, argument_error, usage_error

Reason = tuple[str, str]
"""Why calls are computed, and what helps."""

_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma")
"""Names under which forwards take the timestep."""

_FORMS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda timesteps: timesteps,
    lambda timesteps: timesteps / 1000,
    lambda timesteps: (1000 - timesteps) / 1000,
    lambda timesteps: timesteps - 1,
)
"""How pipelines pass the scheduler's timesteps."""

_REMEDY = "Use a model with an adapter, or write one: see docs/adding-a-family.md."

_UNWATCHED = (
    "the transformer's forward did not run where lesa can watch it",
    "Without an adapter, compile only the blocks, with `pipe.transformer.compile_repeated_blocks()`, and do not "
    "replace the forward.",
)
_CHECKPOINTED = (
    "gradient checkpointing is on",
    "Run the pipeline under `torch.no_grad()`, or call `pipe.transformer.disable_gradient_checkpointing()`.",
)

_MOST_ROUTES = 32  # such as for sizes of images; then all are found again


class Probe(Adapter):
    """A transformer that no adapter knows.

    The first computed call is watched: which blocks run, and what the modules after them get. Then the forward runs
    again, with its blocks passed over: what they returned is replaced by NaN, and one of the tensors after them is put
    back in its place. If this gives the same output, everything that the blocks do is in this one tensor, so it is what
    is forecast. In a predicted step, the forward runs in the same way with the forecast in that place. If no tensor is
    such, all calls are computed, and `why_unseen` says why.

    Args:
        pipe: the pipeline.
        transformer: its transformer.

    Raises:
        TypeError: it has no lists of blocks, or its forward takes no timestep.
    """

    family = "probe"
    transformer_classes = ()
    costs = Costs
    embedders = ()
    attention_kwargs = None
    control_outputs = None
    runs_around = True
    untold = "lesa has no adapter for it"

    def __init__(self, pipe: Any, transformer: Any):
        self.pipe, self.transformer = pipe, transformer
        names = [*inspect.signature(type(transformer).forward).parameters][1:]
        timestep = next((name for name in _TIMESTEPS if name in names), None)
        if not self.blocks or timestep is None:
            lacks = "a list of blocks (`torch.nn.ModuleList`)" if timestep else f"an argument {' or '.join(_TIMESTEPS)}"
            must, got = "have a transformer that lesa can use", f"a {type(transformer).__name__} without {lacks}"
            raise argument_error("pipe", must, Said(got), _REMEDY, TypeError)
        self.timestep_argument = timestep
        others = [name for name in names if name != timestep]
        self.sample_argument = self.sample_argument if self.sample_argument in names else others[0]
        self._others = [name for name in others if name != self.sample_argument]
        self.own_forward = OwnForward(transformer, ())
        self.head_form = HeadForm(transformer)
        self.feature_dim: Any = None  # not known before a call
        self._place: tuple | None = None
        self._form: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._has_other_form = False
        self._forms: Sequence[Callable[[torch.Tensor], torch.Tensor]] = _FORMS  # that fit all calls of the run
        self._timesteps: torch.Tensor | None = None  # of the run
        self._on_entry: Callable | None = None
        self._routes: dict[tuple, Route | Reason] = {}  # by stream of calls and `shape`

    # What the hook asks

    @property
    def notes(self):
        name = type(self.transformer).__name__
        return (
            f"probe: lesa has no adapter for {name}, so predicted steps run its forward without the blocks, and the "
            "forecast is not fused with the output head",
        )

    def on_entry(self, function):
        self._on_entry = function
        return _Listener(self)

    def run_around(self, stream, forward, call, features):
        route = self._routes.get((stream, self.shape(call)))
        if not isinstance(route, Route) or not route.is_current() or features.numel() != route.shape.numel():
            return None
        try:
            return route.run_around(forward, features)
        except WentElsewhere:
            return None

    def why_unseen(self, stream, call, is_first=False):
        if self._is_checkpointed():
            return _CHECKPOINTED
        known = self._routes.get((stream, self.shape(call)))
        if known is None and not any(name == stream for name, _ in self._routes):
            return None if is_first else _UNWATCHED
        return None if isinstance(known, Route) else known

    def pass_timesteps(self, timesteps, scheduler):
        return timesteps if self._form is None else self._form(timesteps)

    @property
    def has_other_form(self):
        return self._has_other_form

    @property
    def place(self):
        return self._place

    def sample(self, call):
        tensor = _first_tensor(self._samples(call))
        return next(self.projection.parameters()) if tensor is None else tensor

    def _samples(self, call: dict) -> Any:
        """The first argument with a tensor: a call may leave out the one that is usual."""
        values = (call.get(name) for name in (self.sample_argument, *self._others))
        return next((value for value in values if _first_tensor(value) is not None), None)

    def timestep(self, call):
        timestep, self._has_other_form = super().timestep(call), False
        if isinstance(timestep, (int, float)):
            timestep = torch.tensor([timestep], dtype=torch.float64)
        timesteps = getattr(self.pipe.scheduler, "timesteps", None)  # others in each run
        if timesteps is not self._timesteps:
            self._forms, self._timesteps = _FORMS, timesteps
        if isinstance(timestep, torch.Tensor) and len(self._forms) > 1:
            near = _forms_of(timestep, self.pipe.scheduler)
            forms = [form for form in self._forms if form in near]  # 0 and 500 look alike in two of them
            if not forms:
                return None
            self._forms = forms
            if self._form not in forms:
                self._form, self._has_other_form = forms[0], True
        return None if self._form is None else timestep

    def text(self, call):
        if self.text_argument in self._others and (text := _first_tensor(call[self.text_argument])) is not None:
            return text
        return tuple(tree_leaves([call.get(name) for name in self._others]))

    def shape(self, call):
        """All that the way of a call depends on: the shapes of its tensors, and which arguments are there."""
        return _kind_of({name: value for name, value in call.items() if name != self.timestep_argument})

    def why_head_not_plain(self, own_hook, device):
        return "lesa has no adapter for this transformer"

    @property
    def has_adapters(self):
        return False  # the forward runs itself

    @property
    def projection(self):
        """A module outside of the blocks that has weights. Their device is that of the features."""
        others = outside(self.transformer, self.blocks)
        return next(module for module in reversed(others) if [*module.parameters(recurse=False)])

    @property
    def blocks(self):
        return [block for blocks in block_lists(self.transformer).values() for block in blocks]

    @property
    def counted_modules(self):
        return self.blocks

    # What only an adapter can do

    def condition(self, timestep, inputs, dtype):
        self._refuse("computing what conditions its output head")

    def conditioning(self, call, dtype, device=None):
        self._refuse("recording")

    def decode(self, pipe, latents, height=None, width=None):
        self._refuse("decoding its latents")

    def _refuse(self, what: str) -> NoReturn:
        raise usage_error(f"{what} needs an adapter, and lesa has none for {type(self.transformer).__name__}.", _REMEDY)

    # Watching

    def compute(self, stream, forward, args, kwargs):
        call, run = self.bind(args, kwargs), functools.partial(forward, *args, **kwargs)
        key = stream, self.shape(call)
        known = self._routes.get(key)
        if self._is_checkpointed() or (known is not None and not isinstance(known, Route)):
            return run()
        see = functools.partial(self._show, _count(self._samples(call)))
        if known is not None and known.is_current():
            output, is_known = known.run_seen(run, functools.partial(see, known))
            if not is_known:  # the lengths in a mask, for example, are others
                again = _Again(forward, args, kwargs)
                self._find(key, again, again, see)
            return output
        return self._find(key, run, _Again(forward, args, kwargs), see)

    def _find(self, key: tuple, run: Callable[[], Any], again: Callable[[], Any], see: Callable) -> Any:
        """Computes a call by `run`, and finds its way; `again` does the same any number of times."""
        watch = Watch(self.transformer, block_lists(self.transformer))
        output = watch.run(run)
        if len(self._routes) == _MOST_ROUTES:
            self._routes.clear()
        try:
            route, features = find_route(watch, again, output)
        except Unclear as reason:
            self._routes[key] = str(reason), _REMEDY
        else:
            self._routes[key] = route
            see(route, features)
        return output

    def _show(self, batch: int, route: Route, tensor: torch.Tensor) -> None:
        """Shows the hook the features `[B, T, D]`. The first dimension of a tensor need not be that of the samples."""
        rows = batch if tensor.ndim > 2 and len(tensor) == batch else 1
        if self._on_entry is not None:
            features = tensor.to(route.narrow).reshape(rows, -1, tensor.shape[-1])
            self._place = route.place
            self._on_entry(route.module, (features, None), {})

    def _is_checkpointed(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(getattr(module, "gradient_checkpointing", False) for module in self.transformer.modules())


class _Again:
    """Runs a forward again with the arguments that it had, whatever it did to them.

    Args:
        forward: the forward.
        args, kwargs: its arguments.
    """

    def __init__(self, forward: Callable, args: tuple, kwargs: dict[str, Any]):
        self._forward, self._given = forward, tree_map(_copied, (args, kwargs))

    def __call__(self) -> Any:
        args, kwargs = tree_map(_copied, self._given)
        return self._forward(*args, **kwargs)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


class _Listener:
    """What `Probe.on_entry` has put on."""

    id = -1  # of no hook on a module

    def __init__(self, probe: Probe):
        self._probe = probe

    def remove(self) -> None:
        """Takes it away."""
        self._probe._on_entry = None


def _forms_of(timestep: torch.Tensor, scheduler: Any) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """How the pipeline can have passed the scheduler's timestep."""
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or not len(timesteps) or not timestep.numel():
        return []
    indices = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    position = next((index for index in indices if index is not None), 0)
    value, dtype = timestep.flatten()[0].item(), timestep.dtype
    precision = max(torch.finfo(dtype).eps, 1e-6) if dtype.is_floating_point else 1e-6
    for given in (timesteps[position : position + 1], timesteps):  # a loop of the user's own has no position
        given = given.to("cpu", dtype)
        near = []
        for form in _FORMS:
            tolerance = precision * max(1.0 if form is _FORMS[2] else abs(value), 1e-3)
            if (form(given).double() - value).abs().min() <= tolerance:
                near.append(form)
        if near:
            return near
    return []


def _kind_of(value: Any) -> Any:
    """The form of an argument: the shapes of its tensors, and which parts it has. Numbers may change in a run."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _kind_of(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_kind_of, value))
    return value if isinstance(value, (bool, str)) or value is None else type(value)


def _count(samples: Any) -> int:
    """How many samples there are: a list has one tensor for each."""
    if isinstance(samples, (list, tuple)):
        return len(samples)
    tensor = _first_tensor(samples)
    return len(tensor) if tensor is not None and tensor.ndim else 1


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)
