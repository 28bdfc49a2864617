"""The names of runs: what a run is, and where several have the same name, whose it is."""

from collections.abc import Sequence
from pathlib import PurePath

SEPARATOR = "@"
"""Between a name that several runs have and what distinguishes them."""


def unique_names(runs: Sequence[tuple[str, str | None]]) -> list[str]:
    """Names that differ. They do not depend on the order of the runs, and runs of other names do not change them.

    Args:
        runs: of each the name, such as "newton-9", and what distinguishes it from others of that name: the folder of
            its predictor, or a digest. None if that is not known; such a run keeps its name.

    Returns:
        A name that only one run has is unchanged. Where several share it, `@` and the last part of the folder follow
        it; more parts where the last one is not enough.
    """
    return [
        name if mark is None else name + _suffix(mark, _others(runs, number))
        for number, (name, mark) in enumerate(runs)
    ]


def _others(runs: Sequence[tuple[str, str | None]], number: int) -> list[str]:
    """What distinguishes the other runs of the same name."""
    name, _ = runs[number]
    return [mark or "" for other, (its_name, mark) in enumerate(runs) if other != number and its_name == name]


def _suffix(mark: str, others: Sequence[str]) -> str:
    if not others:
        return ""
    parts = PurePath(mark).parts
    for count in range(1, len(parts)):
        tail = parts[-count:]
        if all(PurePath(other).parts[-count:] != tail for other in others):
            return SEPARATOR + "/".join(tail)
    return SEPARATOR + mark
