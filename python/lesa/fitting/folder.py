"""The folder of a fit: unfinished work, which the same call continues, or finished predictors."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa.artifacts import CONTINUE, check_same_settings, digest, files_in, fingerprint, remove_partial, write_text
from lesa.conditions import common_conditions, conditions_of, differing
from lesa.models import adapters_for
from lesa_kernels.checks import Said, argument_error
from lesa_kernels.predictor.files import CONFIG_NAME

WORK, STATE = "work", "state.json"

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
        self._state = self.work / STATE

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `ValueError` unless the folder is empty or holds unfinished work with these settings."""
        remove_partial(self._state)
        state = self._read()
        if state is not None:
            self._check_same(state["settings"], settings)
            return
        others = [path for path in files_in(self.path) if path != self.work]
        others += files_in(self.work) if self.work.is_dir() else []
        if not others or (self.work.is_dir() and self.is_finished):
            return
        has_predictor = any((path / CONFIG_NAME).exists() or path.name == CONFIG_NAME for path in others)
        got = Said(f"a predictor in {self.path}" if has_predictor else f"files in {others[0].parent}")
        raise argument_error("out_dir", "be empty or hold an unfinished fit", got, "Choose another folder.")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Writes what this fit is made with."""
        self.work.mkdir(exist_ok=True)
        if self._read() is None:
            self._write({"settings": settings, "is_finished": False})

    def _check_same(self, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raises `ValueError` unless unfinished work was begun with these settings. The message says what differs."""
        work = f"the unfinished fit in {self.path}"
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

    @property
    def is_finished(self) -> bool:
        """Whether all predictors are there, and only what led to them has to be removed."""
        if self.work.is_dir() and not files_in(self.work):  # it was interrupted between the last two operations
            return all((place / CONFIG_NAME).exists() for place in self.places.values())
        return bool((self._read() or {}).get("is_finished"))

    def finish(self) -> None:
        """Removes what led to the predictors."""
        state = self._read()
        if state is not None:
            self._write({**state, "is_finished": True})
            for path in self.work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != self._state:
                    path.unlink()
            self._state.unlink()
        self.work.rmdir()

    def _write(self, state: Mapping[str, Any]) -> None:
        write_text(self._state, json.dumps(state) + "\n")

    def _read(self) -> dict[str, Any] | None:
        if not self._state.exists():
            return None
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if isinstance(state["settings"], dict) and isinstance(state["settings"]["inputs_by_name"], dict):
                return state
        except (ValueError, KeyError, TypeError):
            pass
        must, got = "hold a fit that can be read", Said(f"{self._state}, which is damaged")
        raise argument_error("out_dir", must, got, f"Delete {self.work} to begin again.")
