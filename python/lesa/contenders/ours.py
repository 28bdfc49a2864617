"""The predictors of this package as contenders: one kind for each registered forecaster."""

import colorsys
import functools
import types

from lesa.contenders.base import Color, Ours
from lesa_kernels import FusedKANPredictor, PredictorConfig
from lesa_kernels.forecasters import FORECASTERS, Forecaster

COLORS = (
    Color("#0b6e4f", "#54d3a5"),
    Color("#2f66a8", "#82b5ec"),
    Color("#a03a3a", "#f0908f"),
    Color("#4d7a1f", "#a9d66b"),
    Color("#5a4fc0", "#aaa2f5"),
    Color("#0a7ea4", "#6cc8ea"),
    Color("#8a5a2b", "#d9ab7a"),
    Color("#9c2f9c", "#e79ae7"),
)
"""In the order in which forecasters are registered."""


@functools.cache
def ours_of(forecaster: Forecaster) -> type[Ours]:
    """The kind of contender that predictors of a registered forecaster are."""
    parts = {
        "__doc__": f"Predictors of the mixer {forecaster.name!r}, with their schedules.",
        "__module__": __name__,
        "name": forecaster.name,
        "title": forecaster.title,
        "label": forecaster.label,
        "color": _color([*FORECASTERS].index(forecaster.name)),
        "is_trained": forecaster.is_trained,
        "detail": classmethod(lambda cls, config: _detail(config)),
        "variants": classmethod(lambda cls, feature_dim: _variants(forecaster, feature_dim)),
    }
    return types.new_class(type(forecaster).__name__, (Ours,), exec_body=lambda namespace: namespace.update(parts))


def _detail(config: PredictorConfig) -> str:
    return config.forecaster.describe(config)


def _variants(forecaster: Forecaster, feature_dim: int) -> list[FusedKANPredictor]:
    width = feature_dim if forecaster.knows_width else None
    every = [PredictorConfig(width, mixer=forecaster.name, options=dict(options)) for options in forecaster.variants]
    return [FusedKANPredictor(config) for config in dict.fromkeys(every)]


def _color(number: int) -> Color:
    """Of the forecaster with this number. Those beyond `COLORS` get hues that differ."""
    if number < len(COLORS):
        return COLORS[number]
    hue = number * (5**0.5 - 1) / 2 % 1

    def of_lightness(lightness: float) -> str:
        return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.6))

    return Color(of_lightness(0.33), of_lightness(0.72))
