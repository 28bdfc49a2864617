"""The weights of forecasters, transcribed in plain Python and NumPy.

Each function gives the weights of the features that are read, newest first. It gets the options of the forecaster, the
noise levels of these features and the one to forecast, then the same as steps of the run: the steps of the features,
the step to forecast, and how many steps the run has.
"""

import math

import numpy as np


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


TRANSCRIPTIONS = {"linear": linear_weights, "taylor": taylor_weights, "chebyshev": chebyshev_weights}
