"""The weights of forecasters, transcribed in plain Python and NumPy.

Each function gives the weights of the features that are read, newest first. It gets the options of the forecaster, the
noise levels of these features and the one to forecast, then the same as steps of the run: the steps of the features,
the step to forecast, and how many steps the run has.
"""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.interpolate import BSpline

import lesa_kernels


def linear_weights(options, levels, sigma, steps, step, total):
    if len(levels) == 1:
        return [1.0]
    slope = (sigma - levels[0]) / (levels[0] - levels[1])
    return [1 + slope, -slope] + [0.0] * (len(levels) - 2)


def taylor_weights(options, levels, sigma, steps, step, total):
    """By the factors that a series keeps from update to update, oldest feature first."""
    factors, before, order = [], None, options["order"]
    for number, at in enumerate(reversed(steps)):
        new = [np.eye(len(steps))[len(steps) - 1 - number]]
        for j in range(min(order, len(factors))):
            new.append((new[j] - factors[j]) / (at - before))
        factors, before = new, at
    return sum(factor * (step - steps[0]) ** j / math.factorial(j) for j, factor in enumerate(factors))


def chebyshev_weights(options, levels, sigma, steps, step, total):
    """Ridge regression as least squares with rows that pull the coefficients to zero."""
    degree, blend = options["degree"], options["blend"]

    def row(at):
        return np.cos(np.arange(degree + 1) * np.arccos((at - total / 2) / (total / 2)))

    rows = np.stack([row(at) for at in steps] + [*math.sqrt(options["ridge"]) * np.eye(degree + 1)])
    targets = np.concatenate([np.eye(len(steps)), np.zeros((degree + 1, len(steps)))])
    fitted = row(step) @ np.linalg.lstsq(rows, targets, rcond=None)[0]
    line = np.eye(len(steps))[0]
    if len(steps) > 1:
        ahead = (step - steps[0]) / (steps[0] - steps[1])
        line = (1 + ahead) * line - ahead * np.eye(len(steps))[1]
    return blend * fitted + (1 - blend) * line


def universal_weights(options, levels, sigma, steps, step, total):
    """With spline units from SciPy, and each divided difference from the solution of a linear system."""
    folder = Path(lesa_kernels.__file__).parent / "forecasters"
    p = {name: value.astype(np.float64) for name, value in load_file(folder / "universal.safetensors").items()}
    count, found = len(levels), np.eye(len(levels))[0]
    if count == 1:
        return found
    gap = levels[1] - levels[0]
    ratios = [(levels[k + 1] - levels[k]) / gap if count > k + 1 else 1.0 for k in (1, 2)]
    ahead = np.clip((levels[0] - sigma) / gap, math.exp(-4), math.exp(3))
    inputs = [math.log(ahead), *np.clip(np.log(ratios), -3, 3), 2 * sigma - 1]
    stage = sum(np.float32(sigma) <= np.float32(bound) for bound in (0.67, 0.33))
    u = np.tanh(p["in_weight"][stage] @ [*inputs, math.log(max(gap, 1e-3)) / 2 + 1.2] + p["in_bias"][stage])
    knots = -1 + 0.4 * (np.arange(12) - 3)
    units = [float(BSpline(knots, c, 3)(v)) + v / (1 + math.exp(-v)) for c, v in zip(p["spline"][stage], u)]
    scales = p["out_weight"][stage] @ units + p["out_bias"][stage]
    for order in range(1, min(count, 4)):
        powers = np.vander(levels[: order + 1], order + 1, increasing=True)
        leading = np.linalg.solve(powers, np.eye(order + 1))[-1]  # of the polynomial through the features
        found[: order + 1] += scales[order - 1] * math.prod(sigma - s for s in levels[:order]) * leading
    return found


def l2p_row(step, count):
    """The weights that a test gives to a fitted step, from `count` features."""
    return [math.cos(3 * step + k) for k in range(count)]


def l2p_weights(options, levels, sigma, steps, step, total):
    """The even steps of the run are fitted, from features of steps of the run. Others get a line."""
    is_fitted = all(abs(each - round(each)) < 1e-4 for each in (step, *steps)) and round(step) % 2 == 0
    return l2p_row(round(step), len(steps)) if is_fitted else linear_weights(options, levels, sigma, steps, step, total)


TRANSCRIPTIONS = {
    "linear": linear_weights,
    "taylor": taylor_weights,
    "chebyshev": chebyshev_weights,
    "universal": universal_weights,
    "l2p": l2p_weights,
}
