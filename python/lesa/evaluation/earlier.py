"""What an earlier evaluation left in the output folder, and what becomes of it in the next one."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lesa.artifacts import check_same_settings
from lesa.contenders import Reference
from lesa.evaluation.naming import unique_names
from lesa.evaluation.result import EvaluatedRun
from lesa.evaluation.shown import Shown
from lesa.evaluation.store import REMEDY, UNREADABLE, Kept, Store, read_run
from lesa.evaluation.summaries import SUMMARY, read_summary
from lesa_kernels.checks import Said, argument_error

_NOT_COMPARED = ("name", "speedup", "is_best", "against_ours", "against_ours_by_whole_steps")
"""Fields of a run in the summary that depend on other runs."""


@dataclass(frozen=True)
class Entry:
    """A run, what is shown of it, and what distinguishes it from others of its name.

    Args:
        run: its figures, with a name that others may share.
        shown: what is shown of it.
        identity: a digest of the contender's `identity()`. None if that is not known.
    """

    run: EvaluatedRun
    shown: Shown
    identity: str | None

    @property
    def mark(self) -> str | None:
        """The suffix of the name if other runs have the same name."""
        if self.run.predictor is not None:
            return self.run.predictor
        return None if self.identity is None else self.identity[:8]

    def is_same_contender(self, other: "Entry") -> bool:
        """Whether `other` is a run of the same predictor or setting.

        A predictor is known by its folder or its name, whatever its weights. If one of the two is not known, or was
        searched, the runs are the same if their settings are, or else if they gave the same.
        """
        ours, theirs = self.run, other.run
        if None not in (ours.predictor, theirs.predictor):
            return ours.predictor == theirs.predictor
        if ours.contender != theirs.contender or ours.name != theirs.name:
            return False
        if None not in (self.identity, other.identity):
            return self.identity == other.identity
        return _made(ours) == _made(theirs)


@dataclass(frozen=True)
class Earlier:
    """What an earlier evaluation left.

    Args:
        entries: by their names in its summary, its runs without the reference.
        facts: what else its summary says.
        absent: names of runs whose files are missing or damaged. This evaluation may make them again.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    absent: Sequence[str] = ()


def earlier_in(
    out_dir: str | os.PathLike | None, store: Store, labels: Collection[str], contenders: Collection[str]
) -> Earlier:
    """What is in the output folder. It changes nothing.

    Args:
        out_dir: the output folder. None: there is nothing.
        store: of this evaluation.
        labels: of its predictors.
        contenders: names of all kinds that it runs.

    Raises:
        ValueError: its summary is damaged, its runs were made from something else than those of
            this evaluation, or files are missing that this evaluation does not make again.
    """
    if out_dir is None:
        return Earlier()
    folder = Path(out_dir)
    store.check_settings()
    if not (folder / SUMMARY).exists():
        return Earlier()
    summary = read_summary(folder, "out_dir", "Choose another folder, or remove the file.")
    known = {name: value for name, value in store.settings.items() if name in summary}
    check_same_settings(f"the evaluation in {folder}", summary, known)
    runs = summary["runs"][1:]
    if runs and not store.has_settings() and store.has_other_reference():
        must = "hold an evaluation of the same inputs, model and scheduler"
        raise argument_error("out_dir", must, Said(f"{folder}, which has another one"), REMEDY)
    found = _files_of(folder, store)
    entries, absent = {}, []
    for run in runs:
        kept = next((kept for kept in found if _is_run(run, kept.run)), None)
        if kept is not None:
            entries[run["name"]] = Entry(kept.run, kept.shown, kept.identity)
            continue
        label = run.get("predictor")
        if (label not in labels) if label is not None else (run["contender"] not in contenders):
            remedy = f"Evaluate {run['name']} again with the command that made it, or choose another folder."
            got = Said(f"{folder}, where the files of {run['name']} in runs/ are missing or damaged")
            raise argument_error("out_dir", "hold the files of all its runs", got, remedy)
        absent.append(run["name"])
    return Earlier(entries, summary, absent)


def _files_of(folder: Path, store: Store) -> list[Kept]:
    """The runs whose files are whole and of this evaluation's settings."""
    found = []
    for file in sorted((folder / "runs").glob("*.json")):
        try:
            kept = read_run(file, file.with_suffix(".npz"), with_outcome=False)
        except UNREADABLE:  # settings and searches are here too
            continue
        if kept.run.contender != Reference.name and not store.made_from_other(kept):
            found.append(kept)
    return found


def _is_run(written: Mapping[str, Any], run: EvaluatedRun) -> bool:
    """Whether a run of a summary is this one: it has the same figures."""
    values = json.loads(json.dumps(run.to_dict()))
    return all(values.get(n) == v for n, v in written.items() if n not in _NOT_COMPARED and n in values)


def _made(run: EvaluatedRun) -> str:
    """What a run computed and how close it was, as a text: NaN equals NaN there."""
    return json.dumps([run.steps, run.step_equivalents, dict(run.per_sample)])


@dataclass(frozen=True)
class Merged:
    """An evaluation together with what is kept of the earlier one.

    Args:
        runs: with unique names; those of this evaluation first, in their order.
        shown: what is shown, by run.
        renamed: the new names of the earlier evaluation's runs by the old ones.
        notes: sentences that say what was kept, replaced and left out.
    """

    runs: Sequence[EvaluatedRun]
    shown: Mapping[str, Shown]
    renamed: Mapping[str, str]
    notes: Sequence[str]


def merged(earlier: Earlier, entries: Sequence[Entry]) -> Merged:
    """The runs of this evaluation, and those of the earlier one that it does not replace.

    Args:
        earlier: what is in the folder.
        entries: the runs of this evaluation, the reference first.
    """
    successors = {
        name: next((number for number, entry in enumerate(entries) if entry.is_same_contender(old)), None)
        for name, old in earlier.entries.items()
    }
    named: dict[int, Entry] = {}
    for name, number in successors.items():
        old = earlier.entries[name]
        is_named = old.run.predictor is not None
        # A search can find the setting of a named predictor. Its run keeps the name. Further names are other runs.
        if number is not None and is_named and entries[number].run.predictor is None:
            first = named.setdefault(number, old)
            successors[name] = number if first is old else None
    entries = [named.get(number, entry) for number, entry in enumerate(entries)]
    kept = [name for name, number in successors.items() if number is None]
    every = [*entries, *(earlier.entries[name] for name in kept)]
    names = unique_names([(entry.run.name, entry.mark) for entry in every])
    renamed = dict(zip(kept, names[len(entries) :]))
    renamed |= {name: names[number] for name, number in successors.items() if number is not None}
    notes = [f"Kept from earlier commands: {', '.join(renamed[name] for name in kept)}."] if kept else []
    for name, number in successors.items():
        if number is not None and is_replaced(earlier.entries[name], entries[number].identity):
            where = entries[number].run.predictor
            notes.append(f"Replaced {name}: {where} now has another predictor or another schedule than before.")
    absent = [name for name in earlier.absent if name not in names]
    notes += [f"Left out {name}: its files were missing or damaged, and it was not run again." for name in absent]
    return Merged(
        [replace(entry.run, name=name) for name, entry in zip(names, every)],
        {name: entry.shown for name, entry in zip(names, every)},
        renamed,
        notes,
    )


def is_replaced(before: Entry, identity: str | None) -> bool:
    """Whether a run of the same predictor or setting with this identity is known to differ from the one before."""
    return None not in (before.identity, identity) and before.identity != identity


def merged_facts(earlier: Mapping[str, Any], facts: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The facts of this evaluation, with what earlier ones say about contenders that are not in this one.

    Args:
        earlier: the facts of the earlier evaluation.
        facts: of this one.
        renamed: the new names of runs by the old ones.
    """
    searched = dict(facts["searched"])
    for name, before in (earlier.get("searched") or {}).items():
        rows = [_renamed(row, renamed) for row in before["budgets"]]
        if name not in searched:
            searched[name] = {**before, "budgets": rows}
            continue
        now = searched[name]
        asked = {(row["budget"], row["by"]) for row in now["budgets"]}
        others = [{**row, "samples": row.get("samples", before["samples"])} for row in rows]
        others = [row for row in others if (row["budget"], row["by"]) not in asked]
        searched[name] = {**now, "budgets": [*now["budgets"], *others]}
    not_available = {**(earlier.get("not_available") or {}), **facts["not_available"]}
    for name in {*facts["searched"]} - {*facts["not_available"]}:
        not_available.pop(name, None)
    bounds = facts["stage_bounds"] or earlier.get("stage_bounds") or []
    return {**facts, "searched": searched, "not_available": not_available, "stage_bounds": bounds}


def _renamed(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    return {**row, "run": renamed.get(row["run"], row["run"])}
