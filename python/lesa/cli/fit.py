"""`lesa fit`."""

import json
import time
from typing import Any

import lesa
from lesa.cli import arguments

OPTIONS = {
    **arguments.RUN_OPTIONS,
    **arguments.CONDITION_OPTIONS,
    "out_dir": "--out",
    "budget": "--budget",
    "batch_size": "--batch-size",
    "end_to_end": "--end-to-end",
    "loss": "--loss",
}


LOSSES = ("latents", "pixels")
"""Those of `lesa.fit`, which needs torch."""


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    arguments.add_inputs(parser, required=False, default="default: built-in prompts")
    text = "number of computed steps, such as 9; several numbers such as 12,9,7 make a predictor for each"
    parser.add_argument("--budget", required=True, type=arguments.budget, metavar="N", help=text)
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder for the predictor")
    arguments.add_run(parser)
    text = "samples per pipeline call (default: 1)"
    parser.add_argument("--batch-size", type=arguments.positive, default=1, help=text)
    text = "also train through whole runs, and choose the computed steps by runs; it takes longer"
    parser.add_argument("--end-to-end", action="store_true", help=text)
    text = "with --end-to-end, what is compared at the end of the runs (default: latents)"
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0], help=text)


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import check_model, pipeline_of, prepare, read
    from lesa.cli.trying import explained
    from lesa.fitting.inputs import chosen_inputs
    from lesa.fitting.whole import without_figures
    from lesa.inputs import Sample
    from lesa.processes import processes_for
    from lesa_kernels.checks import usage_error

    if options.loss != LOSSES[0] and not options.end_to_end:
        sentence = "`--loss` is that of a training through whole runs."
        raise usage_error(sentence, "Set `--end-to-end`, or leave it out.")
    kind, has_inputs = check_model(options), options.inputs is not None
    samples = read(options, kind) if has_inputs else []
    pipe = pipeline_of(options)
    if not has_inputs:
        samples = [Sample(f"built-in prompt {i}", item) for i, item in enumerate(chosen_inputs(pipe, None))]
    samples = prepare(options, pipe, samples, options.steps)
    start = time.perf_counter()
    with explained(pipe, samples, options.steps), without_figures():
        lesa.fit(
            pipe,
            [sample.arguments for sample in samples] if has_inputs else None,
            budget=options.budget,
            out_dir=options.out,
            num_inference_steps=options.steps,
            batch_size=options.batch_size,
            end_to_end=options.end_to_end,
            loss=options.loss,
            seed=options.seed,
        )
    if processes_for(pipe).is_first:
        _show(options, time.perf_counter() - start)


def _show(options, seconds: float) -> None:
    """Prints how good the predictors are, and where the files are."""
    from lesa.artifacts import files_in
    from lesa.fitting.folder import FitFolder
    from lesa.fitting.whole import EVALUATION

    is_list = isinstance(options.budget, list)
    folder = FitFolder(options.out, options.budget if is_list else [options.budget], is_list)
    for place in folder.places.values():
        evaluation = json.loads((place / EVALUATION).read_text(encoding="utf-8"))
        names = sorted(path.name for path in files_in(place))
        print(f"\n{_table(evaluation)}\n\nWrote {', '.join(names)} to {place}")
    print(f"This call took {seconds / 60:.1f} minutes.")


def _table(evaluation: dict[str, Any]) -> str:
    """The figures of the test: of the predictor, without training, and of fewer steps."""
    from lesa_kernels.forecasters import UNTRAINED

    of_latents, total = evaluation["compared"] == "latents", evaluation["num_inference_steps"]
    columns = {"PSNR of latents, dB": "latent_psnr"} if of_latents else {"PSNR, dB": "psnr", "SSIM": "ssim"}
    rows = [("", "computed steps", *columns)]
    for run in evaluation["runs"][1:]:  # the first one has all steps computed
        name = {UNTRAINED: "without training", "steps": "fewer steps"}.get(run["contender"], "this predictor")
        figures = ["-" if run[key] is None else f"{run[key]:.{4 if key == 'ssim' else 2}f}" for key in columns.values()]
        rows.append((name, f"{run['whole_steps']:.4g} of {run['num_inference_steps']}", *figures))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    served = "inputs and seeds that served nothing else" if evaluation["inputs_are_new"] else "other seeds, same inputs"
    what = f"Mean of {evaluation['samples']} samples ({served}), against all {total} steps and the same seed:"
    notes = [f"There is no run of fewer steps: {why}." for why in evaluation["not_available"].values()]
    return "\n".join([what, *lines, *notes])
