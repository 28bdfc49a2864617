"""Predictors without training."""

import math

import torch

from lesa_kernels import FusedKANPredictor, PredictorConfig

DIM = 128  # the feature width of the digits model


def untrained_predictor(dim=DIM, seed=0, **options):
    """A predictor with its initial weights: newton extrapolates along a line through the newest two anchors."""
    torch.manual_seed(seed)
    return FusedKANPredictor(PredictorConfig(dim, **{"rank": 4, "hidden": 8, **options}))


def make_predictor(below=None, dim=DIM, seed=0, **options):
    """A predictor whose forecast depends on all its anchors. It gives NaN below the noise level `below`."""
    predictor = untrained_predictor(dim, seed, **options)
    if predictor.config.mixer == "newton":
        torch.nn.init.constant_(predictor.out_bias[:, 1:], 0.3)
    else:
        torch.nn.init.normal_(predictor.mix_weight, std=0.01)
    return predictor if below is None else with_nan(predictor, below)


class NanPredictor(FusedKANPredictor):
    """Gives NaN at the noise levels between `above` and `below`."""

    def plan(self, levels, sigmas, batch):
        planned = super().plan(levels, sigmas, batch)
        return [weights._replace(anchors=weights.anchors * self._factor(s)) for weights, s in zip(planned, sigmas)]

    def _factor(self, sigma):
        return math.nan if self.above < sigma < self.below else 1


class NanForward(NanPredictor):
    """The same, for a predictor that has no weights to plan, or if they are not used."""

    def forward(self, ring, sigma):
        return super().forward(ring, sigma) * self._factor(sigma)


def with_nan(predictor, below, above=-math.inf):
    """Lets `predictor` give NaN at the noise levels between `above` and `below`, and returns it."""
    predictor.__class__ = NanPredictor if predictor.config.mixer == "newton" else NanForward
    predictor.above, predictor.below = above, below
    return predictor


def rings_of(predictor):
    """A list that gets every ring which `predictor` makes from now on."""
    rings, make_ring = [], predictor.make_ring

    def remember(*args):
        rings.append(make_ring(*args))
        return rings[-1]

    predictor.make_ring = remember
    return rings
