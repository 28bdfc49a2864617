"""What `evaluate` compares: predictors of lesa, runs of fewer steps, and the caches of others.

A contender is one file in this folder, and its entry in `CONTENDERS`; docs/adding-a-contender.md shows an example. The
predictors of each registered forecaster are one kind of contender, without a file of their own. If they need no
training, their best settings are searched like those of a cache of others.
Evaluation, table, picture, report and command line use only what `lesa.contenders.base` says that contenders have.
"""

import re
from collections.abc import Sequence

from lesa.cache.error_control import ErrorControl
from lesa.contenders.base import BISECTED, THRESHOLDS, UNKNOWN_COLOR, Color, Contender, Grid, Ours, Peer, Plain
from lesa.contenders.cache_dit import CacheDiT
from lesa.contenders.fewer_steps import FewerSteps
from lesa.contenders.first_block_cache import FirstBlockCache
from lesa.contenders.mag_cache import MagCache
from lesa.contenders.ours import ours_of
from lesa.contenders.reference import Reference
from lesa.contenders.taylorseer import TaylorSeer, taylorseer_grid
from lesa.schedule import Schedule, Spread
from lesa_kernels import FusedKANPredictor
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.forecasters import FORECASTERS, SHIPPED, Forecaster

__all__ = [
    "AGAINST",
    "BISECTED",
    "CONTENDERS",
    "THRESHOLDS",
    "UNKNOWN_COLOR",
    "CacheDiT",
    "Color",
    "Contender",
    "Dense",
    "FewerSteps",
    "FirstBlockCache",
    "Grid",
    "MagCache",
    "Newton",
    "Opponent",
    "Ours",
    "Peer",
    "Plain",
    "Reference",
    "TaylorSeer",
    "against_names",
    "budget_of",
    "check_contenders",
    "every_contender",
    "kind_of",
    "opponents",
    "order_of",
    "ours_with",
    "taylorseer_grid",
]

Newton, Dense, *_NEWER = map(ours_of, SHIPPED)

# The order is that of the report. A contender's mark there follows from its place, so new ones go to the end.
CONTENDERS: tuple[type[Contender], ...] = (
    Reference,
    Newton,
    Dense,
    TaylorSeer,
    FewerSteps,
    FirstBlockCache,
    MagCache,
    CacheDiT,
    *_NEWER,
)

Opponent = type[Plain] | type[Peer] | type[Ours]
"""A kind of contender that `against` can name."""

AGAINST = (FewerSteps.name, TaylorSeer.name)
"""What predictors are compared with by default."""


def check_contenders(contenders: Sequence[type[Contender]]) -> None:
    """Raises `TypeError` or `ValueError` unless the contenders can be registered together."""
    for kind in contenders:
        if not issubclass(kind, Ours):
            parameters = vars(kind).get("__dataclass_params__")
            if parameters is None or not parameters.frozen:
                remedy = "Write @dataclass(frozen=True) above it, so that equal settings run once and can be resumed."
                raise argument_error(kind.__qualname__, "be a frozen dataclass", kind, remedy, TypeError)
    for field in ("name", "title", "color"):
        values = [getattr(kind, field) for kind in contenders]
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise argument_error(
                "CONTENDERS", f"differ in `{field}`", Said(f"{twice[0]!r} twice"), f"Change one `{field}`."
            )


check_contenders(CONTENDERS)


def every_contender() -> tuple[type[Contender], ...]:
    """`CONTENDERS`, and the predictors of the forecasters that users registered.

    Raises:
        ValueError: one of these has the name or the title of a contender.
    """
    known = {kind.name for kind in CONTENDERS if issubclass(kind, Ours)}
    return (*CONTENDERS, *(_user_kind(each) for name, each in FORECASTERS.items() if name not in known))


def _user_kind(forecaster: Forecaster) -> type[Ours]:
    """The contender that predictors of a registered forecaster are; raises `ValueError` if it is not one of its own."""
    for kind in CONTENDERS:
        for text in ("name", "title"):
            if getattr(kind, text) == getattr(forecaster, text):
                must, remedy = f"differ from that of the contender {kind.__name__}", "Change it, and register it again."
                name = f"{type(forecaster).__qualname__}.{text}"
                raise argument_error(name, must, getattr(forecaster, text), remedy)
    return ours_of(forecaster)


def kind_of(name: str) -> type[Contender] | None:
    """The contender that has this name, or None."""
    return next((kind for kind in every_contender() if kind.name == name), None)


def order_of(name: str) -> int:
    """The place of the contender in `every_contender()`, without the reference; unknown ones come last."""
    names = [kind.name for kind in every_contender() if kind is not Reference]
    return names.index(name) if name in names else len(names)


def opponents() -> list[Opponent]:
    """The contenders that `against` can name.

    These are runs without a cache, then the caches of others, then the forecasters that need no training.
    """
    kinds = every_contender()
    plain = [kind for kind in kinds if issubclass(kind, Plain)]
    peers = [kind for kind in kinds if issubclass(kind, Peer)]
    return [*plain, *peers, *(kind for kind in kinds if issubclass(kind, Ours) and not kind.is_trained)]


def against_names() -> list[str]:
    """The names that `against` takes."""
    return [kind.name for kind in opponents()]


def budget_of(name: object) -> tuple[Opponent, int | None]:
    """The contender and the budget that an entry of `against` names.

    Args:
        name: such as "mag-cache", or "mag-cache-9" for a budget of 9.

    Returns:
        The contender and its budget, None if the name has none.

    Raises:
        ValueError: there is no such contender, it must be trained, or the budget is not a whole number of at least 1.
    """
    match = re.fullmatch("(.*?)(?:-([1-9][0-9]*))?", str(name), re.DOTALL)
    asked = "" if match is None else match[1]
    kind = next((kind for kind in opponents() if kind.name == asked), None)
    if match is None or kind is None:
        trained = kind_of(asked)
        if trained is not None and issubclass(trained, Ours):
            must = "name contenders that need no training"
            raise argument_error("against", must, name, f"Train a {asked} predictor, and pass it in `predictors`.")
        raise argument_error(
            "against",
            f"hold {', '.join(map(repr, against_names()))}, these with a budget such as '{FewerSteps.name}-9', or "
            "settings from lesa.contenders",
            name,
            "Choose among these, with a budget of at least 1.",
        )
    return kind, int(match[2]) if match[2] else None


def ours_with(predictor: FusedKANPredictor, schedule: Schedule | Spread | ErrorControl | None) -> Ours:
    """The contender for a predictor and a schedule, None for the trained one.

    Raises:
        ValueError: a registered forecaster has the name or the title of another contender.
    """
    mixer = predictor.config.mixer
    kind = next(kind for kind in every_contender() if issubclass(kind, Ours) and kind.name == mixer)
    return kind(predictor, schedule)
