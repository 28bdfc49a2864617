"""Files as the released training of LESA saves them, and its forecast in float64: written from facts, for tests."""

import contextlib
import sys
import types
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

MODULES = ("predictor", "predictor.model", "predictor.model.config")
BOUNDS = {"": (0.9, 0.5), "_cond": (0.9, 0.4), "_uncond": (0.9, 0.4)}


@contextlib.contextmanager
def released_types(**more):
    """The types of the released configuration, under its module's name as long as the context is entered.

    Yields an instance. `more` are types that the module has too, by name.
    """

    @dataclass
    class KANConfig:
        hidden_dim: int = 256
        history_depth: int = 8

    @dataclass
    class SolverConfig:
        lr: float = 0.0001
        weight_decay: float = 0.0001
        step_size: int = 500
        gamma: float = 0.5

    @dataclass
    class ModelConfig:
        device: str = "cuda"
        kan: KANConfig = field(default_factory=KANConfig)

    @dataclass
    class Config:
        model: ModelConfig = field(default_factory=ModelConfig)
        solver: SolverConfig = field(default_factory=SolverConfig)

    modules = {name: types.ModuleType(name) for name in MODULES}
    for kind in (KANConfig, SolverConfig, ModelConfig, Config, *more.values()):
        kind.__module__, kind.__qualname__ = MODULES[-1], kind.__name__
        setattr(modules[MODULES[-1]], kind.__name__, kind)
    with_before = {name: sys.modules.get(name) for name in MODULES}
    sys.modules.update(modules)
    try:
        yield Config()
    finally:
        for name, before in with_before.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before


def knots(inputs, ends=(-3.0, 3.0), size=5, order=3, dtype=torch.bfloat16):
    """The buffer `grid` of a layer."""
    gap = (ends[1] - ends[0]) / size
    return torch.tensor([ends[0] + gap * i for i in range(-order, size + order + 1)]).repeat(inputs, 1).to(dtype)


def state_dict(steps=50, hidden=8, depth=8, endings=("",), seed=0, dtype=torch.bfloat16):
    """A state dict with random weights, large enough that every part of it matters."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=random)).to(dtype)

    state = {}
    for ending in endings:
        for stage, length in enumerate((depth // 2, depth, depth)):
            state[f"latent{ending}.{stage}.weight"] = normal(1, length, scale=0.5)
            state[f"latent{ending}.{stage}.bias"] = normal(1, scale=0.5)
            for layer, (inputs, outputs) in enumerate(((steps + 1, hidden), (hidden, hidden), (hidden, 1))):
                key = f"timestep{ending}.{stage}.layers.{layer}"
                state[f"{key}.base_weight"] = normal(outputs, inputs, scale=inputs**-0.5)
                state[f"{key}.spline_weight"] = normal(outputs, inputs, 8, scale=inputs**-0.5)
                state[f"{key}.spline_scaler"] = normal(outputs, inputs)
                state[f"{key}.grid"] = knots(inputs, dtype=dtype)
    return state


def save(file, state, **entries):
    """Writes a checkpoint with all entries that the released code saves. A value of None leaves an entry out."""
    parameters = [torch.nn.Parameter(value.float()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=500, gamma=0.5)
    with released_types() as config:
        contents = {
            "config": config,
            "model": state,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            **entries,
        }
        torch.save({name: value for name, value in contents.items() if value is not None}, file)
    return file


def spline_layer(x, state, key):
    """One layer in float64, by the recursion of Cox and de Boor on the exact knots."""
    t = torch.tensor([-3 + 1.2 * i for i in range(-3, 9)], dtype=torch.float64)
    base, spline, scaler = (
        state[f"{key}.{name}"].double() for name in ("base_weight", "spline_weight", "spline_scaler")
    )
    x = x.unsqueeze(-1)
    bases = ((t[:-1] <= x) & (x < t[1:])).double()
    for d in range(1, 4):
        left = (x - t[: -d - 1]) / (t[d:-1] - t[: -d - 1]) * bases[..., :-1]
        bases = left + (t[d + 1 :] - x) / (t[d + 1 :] - t[1:-d]) * bases[..., 1:]
    x = x.squeeze(-1)
    return F.silu(x) @ base.T + torch.einsum("ig,oig,oi->o", bases, spline, scaler)


def stage_of(t, ending):
    high, low = BOUNDS[ending]
    return 0 if t > high else 1 if t > low else 2


def parts(state, t, times, ending=""):
    """The stage's weights, oldest first, its bias, and alpha, for the noise level t in a run with these times."""
    stage = stage_of(t, ending)
    x = torch.tensor([t - other for other in times], dtype=torch.float64)
    for layer in range(3):
        x = spline_layer(x, state, f"timestep{ending}.{stage}.layers.{layer}")
    key = f"latent{ending}.{stage}"
    return state[f"{key}.weight"].double()[0], state[f"{key}.bias"].double(), x


def forecast(state, history, t, times, ending=""):
    """The forecast in float64 from features, oldest first. Where there are too few, the oldest is repeated."""
    weight, bias, alpha = parts(state, t, times, ending)
    newest = [history[max(i, 0)] for i in range(len(history) - len(weight), len(history))]
    return history[-1] + alpha * (sum(w * h for w, h in zip(weight, newest)) + bias)


def computed_steps(interval, total):
    """The steps that the released code computes, by its counter."""
    counter, steps = 0, []
    for step in range(total):
        if step < 3 or counter == interval - 1:
            counter = 0
            steps.append(step)
        else:
            counter += 1
            steps += [3] if step == 3 else []
    return steps
