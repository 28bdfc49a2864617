"""The folder of a fit: unfinished work, which the same call continues, or finished predictors."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa.artifacts import (
    CONTINUE,
    check_same_settings,
    digest,
    files_in,
    fingerprint,
    read_json,
    remove_partial,
    write_text,
)
from lesa.conditions import common_conditions, conditions_of, differing
from lesa.models import adapters_for
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.predictor.files import CONFIG_NAME

WORK, STATE = "work", "state.json"

DONE = ".fitted.json"
"""The state of a fit whose predictors are complete, while the rest is removed. This file is the last to go."""

_DIGESTS = ("inputs", "inputs_by_name", "transformers", "weights")
"""Settings that error messages do not show."""


def settings_of(pipe: Any, inputs: Sequence[dict], **others: Any) -> dict[str, Any]:
    """All that must be the same for a fit to continue, by name, in types that JSON has.

    Args:
        pipe: the pipeline.
        inputs: dicts of pipeline arguments.
        others: further settings.
    """
    names = sorted({name for item in inputs for name in item})
    settings = {
        **others,
        "pipeline": type(pipe).__name__,
        "inputs": digest([*inputs]),
        "inputs_by_name": {name: digest([item.get(name) for item in inputs]) for name in names},
        "transformers": {name: fingerprint(adapter.transformer) for name, adapter in adapters_for(pipe).items()},
        **conditions_of(pipe),
    }
    settings.pop("unset")
    return json.loads(json.dumps(settings))


def check_same(work: str, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless unfinished work was begun with these settings. The message says what differs.

    Args:
        work: what continues and where, such as "the unfinished fit in runs/a".
        kept: its settings.
        settings: what `settings_of` gives for this call.
    """
    given = common_conditions(kept, settings)
    check_same_settings(work, kept, {name: value for name, value in given.items() if name not in _DIGESTS})
    for name in ("transformers", "weights"):
        if changed := differing(kept[name], {**kept[name], **settings[name]}):
            must = f"have the weights and adapters that it had in {work}"
            raise argument_error(f"pipe.{changed[0]}", must, Said("others"), CONTINUE)
    if kept["inputs"] != settings["inputs"]:
        names = differing(kept["inputs_by_name"], settings["inputs_by_name"])
        which = f", which differ in {', '.join(map(repr, names))}" if names else ""
        raise argument_error("inputs", f"be those of {work}", Said(f"others{which}"), CONTINUE)


class FitFolder:
    """What `fit` writes.

    Args:
        out_dir: the folder.
        budgets: how many steps each predictor computes.
        is_divided: whether each predictor has a folder of its own in it.
    """

    def __init__(self, out_dir: Path, budgets: Sequence[int], is_divided: bool):
        self.path, self.work, self.is_divided = out_dir, out_dir / WORK, is_divided
        self.places = {budget: out_dir / f"budget-{budget}" if is_divided else out_dir for budget in budgets}
        self._state, self._done = self.work / STATE, out_dir / DONE

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `ValueError` unless the folder is empty or holds unfinished work with these settings."""
        remove_partial(self._state)
        state = self._read()
        if state is not None:
            kept = {"end_to_end": False, **state["settings"]}  # a fit of an earlier version does not have it
            check_same(f"the unfinished fit in {self.path}", kept, settings)
            return
        others = [path for path in files_in(self.path) if path != self.work]
        others += files_in(self.work) if self.work.is_dir() else []
        if not others:
            return
        has_predictor = any((path / CONFIG_NAME).exists() or path.name == CONFIG_NAME for path in others)
        got = Said(f"a predictor in {self.path}" if has_predictor else f"files in {others[0].parent}")
        raise argument_error("out_dir", "be empty or hold an unfinished fit", got, "Choose another folder.")

    def begin(self, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes what this fit is made with, unless an earlier call has done so. Returns the facts that are kept.

        Args:
            settings: that must be the same for the fit to continue.
            facts: that the first call decides for those that continue.
        """
        self.work.mkdir(exist_ok=True)
        state = self._read()
        if state is None:
            state = {"settings": settings, "facts": dict(facts)}
            self._write(state)
        return state["facts"]

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Keeps these facts, as long as the fit is unfinished."""
        state = self._read()
        if state is not None and state["facts"] != facts:
            self._write({**state, "facts": facts})

    @property
    def is_finished(self) -> bool:
        """Whether all predictors are there, and only what led to them has to be removed."""
        return self._done.exists()

    def finish(self) -> None:
        """Removes what led to the predictors.

        There is a state until the end. So an interrupted call never leaves predictors of which nothing says for which
        arguments they were made.
        """
        if not self.is_finished:
            self._state.replace(self._done)
        if self.work.is_dir():
            shutil.rmtree(self.work)
        self._done.unlink()

    def _write(self, state: Mapping[str, Any]) -> None:
        write_text(self._state, json.dumps(state) + "\n")

    def _read(self) -> dict[str, Any] | None:
        file = self._done if self.is_finished else self._state
        if not file.exists():
            return None
        state = read_json(file)
        try:
            if all(isinstance(each, dict) for each in (state["facts"]["amounts"], state["settings"]["inputs_by_name"])):
                return state
        except (KeyError, TypeError):
            pass
        must, got = "hold a fit that can be read", Said(f"{file}, which is damaged")
        remedy = f"Delete {self._done} and {self.work}" if self.is_finished else f"Delete {self.work} to begin again"
        raise argument_error("out_dir", must, got, f"{remedy}.")
