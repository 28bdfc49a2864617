"""The model card of a predictor: its README.md, in the form that the Hugging Face hub reads."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa.artifacts import write_text
from lesa.contenders import FewerSteps, kind_of
from lesa.contenders.base import Ours
from lesa.provenance import in_words
from lesa_kernels import PredictorConfig
from lesa_kernels.predictor.files import CONFIG_NAME, PROVENANCE_NAME, read_provenance
from lesa_kernels.predictor.sharing import CARD_NAME, front_matter, mark_of

PICTURE = "comparison.png"

STAGES = {
    "rounds": "that of the rounds of refining",
    "schedules": "that which was trained through whole runs on many schedules",
    "trained again": "that which was trained on recorded features for these computed steps",
    "refined again": "that which was refined for these computed steps",
    "end to end": "that which was trained through whole runs on these computed steps",
}
"""What the predictors of a fit with training through whole runs are called in the card, by name."""

THROUGH_RUNS = ("schedules", "end to end")
"""Those of them that were trained through whole runs."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def base_model_of(pipe: Any) -> str | None:
    """The hub id from which a pipeline was loaded; None if it came from elsewhere. A path is never taken for an id."""
    return _hub_id(getattr(pipe, "name_or_path", None) or getattr(pipe, "_pretrained_model_name_or_path", None))


def _hub_id(name: Any) -> str | None:
    """The name if it is a hub id, and no path of this machine; else None."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        return None
    return None if Path(name).exists() or Path(name).parent.is_dir() else name


def write_card(folder: str | os.PathLike, evaluation: Mapping[str, Any] | None, made: Mapping[str, Any]) -> None:
    """Writes the README.md of a saved predictor. It has no times, dates or paths: the same facts give the same bytes.

    Args:
        folder: of the predictor. Its configuration and `provenance.json` are read. If it has a `comparison.png`, the
            card shows it.
        evaluation: what was measured: `num_inference_steps`, `samples`, `compared`, which is "pictures" or "latents",
            and `runs`. Each run is a dict of fields of `EvaluatedRun`; the first one is the reference, and the first of
            the others is that of the predictor. None: nothing was measured.
        made: how it was made. Each of these may be absent: `base_model`, from `base_model_of`; `seed`, `batch_size`;
            `inputs`, how many inputs the user gave, None for the built-in prompts; `samples`, how many were recorded to
            train on; `updates`, the optimiser steps of the training; `rounds`, those of refining; `updates_per_round`;
            `validation_samples`. With `end_to_end` also `loss`; `stage`, which of the predictors on the way it is, one
            of `STAGES`; and what led to it of these: `schedules_tried`, `updates_on_schedules`, `updates_end_to_end`,
            `samples_end_to_end`, `samples_per_update`, and `began_from`, the stage before the last training.

    Raises:
        FileNotFoundError: there is no predictor in the folder.
        ValueError: its configuration or its `provenance.json` is damaged.
    """
    folder = Path(folder)
    config = PredictorConfig.from_dict(json.loads((folder / CONFIG_NAME).read_text()))
    provenance = folder / PROVENANCE_NAME
    known = read_provenance(provenance) if provenance.is_file() else None
    base_model = _hub_id(made.get("base_model"))
    tags = [config.family] if config.family else []
    sections = [
        front_matter(tags, base_model),
        mark_of(folder),
        f"# {_title(config)}",
        _what_it_is(config, known, base_model),
        f"## Use\n\n```python\n{_use(config)}\n```\n\nReplace the name by that of this repository or folder.",
        *([] if evaluation is None else [_figures(evaluation)]),
        *([_picture(evaluation)] if (folder / PICTURE).is_file() else []),
        _schedule(config),
        f"## The model that it was made for\n\n{_listed(in_words(known))}\n\n{_COMPARED}",
        _how_it_was_made(config, made, base_model),
    ]
    write_text(folder / CARD_NAME, "\n\n".join(section for section in sections if section) + "\n")


_COMPARED = (
    "`lesa.enable_cache` compares these facts with the pipeline. If they differ, it warns, and says in one line what "
    "differs. With another adapter, dtype or scheduler the predictor works, but its pictures are less close."
)


def _title(config: PredictorConfig) -> str:
    if config.schedule is None:
        return "A predictor of lesa-kernels"
    return f"A predictor of lesa-kernels: {len(config.schedule)} of {config.num_inference_steps} steps are computed"


def _what_it_is(config: PredictorConfig, provenance: Mapping[str, Any] | None, base_model: str | None) -> str:
    pipeline = (provenance or {}).get("pipeline")
    model = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "one diffusion transformer"
    family = f" of the family {config.family}" if config.family else ""
    through = f", which `{pipeline}` of diffusers runs" if pipeline else ""
    text = f"This is a predictor for {model}{family}{through}. It works with the Python package lesa-kernels."
    if config.schedule is not None and config.num_inference_steps is not None:
        left = config.num_inference_steps - len(config.schedule)
        text += (
            f" The transformer computes {len(config.schedule)} of {config.num_inference_steps} denoising steps. The "
            f"predictor forecasts the features of the other {left} steps from the features of computed ones."
        )
    return text


def _use(config: PredictorConfig) -> str:
    steps = config.num_inference_steps
    asked = f", num_inference_steps={steps}" if steps else ""
    return f'import lesa\nlesa.enable_cache(pipe, "user/name")\npipe("a prompt"{asked})'


def _figures(evaluation: Mapping[str, Any]) -> str:
    """The table of what was measured."""
    of_latents = evaluation.get("compared") == "latents"
    columns = ["PSNR of the latents, dB"] if of_latents else ["PSNR, dB", "SSIM"]
    _, *runs = evaluation["runs"]
    rows = [["run", "computed steps", *columns]]
    for number, run in enumerate(runs):
        figures = [run["latent_psnr"]] if of_latents else [run["psnr"], run["ssim"]]
        shown = [_number(figure, digits) for figure, digits in zip(figures, (2, 4))]
        rows.append([_name(run, is_this=number == 0), f"{run['whole_steps']:.4g}", *shown])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    count, total = evaluation["samples"], evaluation["num_inference_steps"]
    what = "the latents" if of_latents else "each picture"
    text = (
        f"{_served(_counted(count, 'sample'), evaluation.get('inputs_are_new'))} The figures compare {what} of a run "
        f"with {'those' if of_latents else 'that'} of all {total} steps and the same seed. They are means over the "
        "samples, and higher is better."
    )
    notes = [f"There is no run of fewer steps: {why}." for why in evaluation.get("not_available", {}).values()]
    return "\n".join(["## Figures", "", text, "", head, rule, *body, *(line for note in notes for line in ("", note))])


def _served(samples: str, inputs_are_new: bool | None) -> str:
    """On which samples a predictor was tested. None: it is not known whether their inputs served something else."""
    if inputs_are_new:
        return f"Measured on {samples} whose inputs and seeds served nothing else."
    text = f"Measured on {samples} with other seeds than all samples that served to make the predictor."
    return text if inputs_are_new is None else f"{text} The inputs are not new: some of them served that too."


def _name(run: Mapping[str, Any], is_this: bool) -> str:
    """What a row of the table is called."""
    if is_this:
        return "**this predictor**"
    kind = kind_of(run["contender"])
    if kind is FewerSteps:
        asked = run.get("num_inference_steps", run["whole_steps"])
        is_less = round(run["whole_steps"]) != asked  # a run with `strength` begins later
        return "fewer steps, without a cache" + (f" (the pipeline is asked for {asked})" if is_less else "")
    if kind is not None and issubclass(kind, Ours) and not kind.is_trained:
        return f"without training ({run['contender']})"
    return str(run["name"])


def _picture(evaluation: Mapping[str, Any] | None) -> str:
    names = [] if evaluation is None else [run["name"] for run in evaluation["runs"]]
    shown = f" The runs are {_and(names)}." if len(names) > 1 else ""
    return f"![Pictures of the runs side by side]({PICTURE})\n\nEach column has the same seed.{shown}"


def _schedule(config: PredictorConfig) -> str:
    if config.schedule is None:
        return ""
    steps = ", ".join(map(str, config.schedule))
    text = f"## Schedule\n\nThe computed steps of a run of {config.num_inference_steps} steps are {steps}."
    if config.schedule_sigmas is not None:
        text += " In a run of another number of steps, those are computed whose noise levels are nearest to theirs."
    if config.more_step_counts is not None:
        text += f" It was trained with runs of {', '.join(map(str, config.more_step_counts))} steps too."
    if config.told_levels is not None:
        levels = ", ".join(f"{level:.4g}" for level in config.told_levels)
        text += f" In these steps the model is told the noise levels {levels}, in place of those of its latents."
    return text


def _how_it_was_made(config: PredictorConfig, made: Mapping[str, Any], base_model: str | None) -> str:
    """The command, and how much was done."""
    command = [f"lesa fit --model {base_model or 'MODEL'}"]
    if made.get("inputs") is not None:
        command.append("--inputs FILE")
    if config.schedule is not None:
        command.append(f"--budget {len(config.schedule)}")
    if config.num_inference_steps is not None:
        command.append(f"--steps {config.num_inference_steps}")
    command += [f"--{name.replace('_', '-')} {made[name]}" for name in ("batch_size", "seed") if name in made]
    command += ["--end-to-end", f"--loss {made['loss']}"] if made.get("end_to_end") else []
    facts = []
    if "inputs" in made:
        own = made["inputs"]
        facts.append("inputs: the built-in prompts" if own is None else f"inputs: {own}, given by the user")
    for name, text in (
        ("samples", "recorded samples to train on"),
        ("updates", "optimiser steps of the training"),
        ("rounds", "rounds of refining"),
        ("updates_per_round", "optimiser steps of each round"),
        ("validation_samples", "samples to compare the rounds with"),
        ("schedules_tried", "schedules that were compared by runs"),
        ("updates_on_schedules", "optimiser steps through whole runs on many schedules, before these were compared"),
        ("updates_end_to_end", "optimiser steps through whole runs in the end, on these computed steps"),
        ("samples_end_to_end", "samples for the training through whole runs"),
        ("samples_per_update", "of these, for each optimiser step"),
    ):
        if made.get(name) is not None:
            facts.append(f"{text}: {made[name]}")
    if made.get("end_to_end"):
        facts.append(f"the predictor that was best with the samples for comparisons: {STAGES[made['stage']]}")
        if made.get("began_from"):
            facts.append(f"where its last training began: {STAGES[made['began_from']]}")
        if made["stage"] not in THROUGH_RUNS:
            facts.append("this predictor was not trained through whole runs")
    return f"## How it was made\n\n```bash\n{' '.join(command)} --out FOLDER\n```\n\n{_listed(facts)}".rstrip()


def _listed(facts: Iterable[str]) -> str:
    return "\n".join(f"- {fact}" for fact in facts)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
