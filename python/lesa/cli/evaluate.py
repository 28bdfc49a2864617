"""`lesa evaluate`."""

from pathlib import Path

import lesa
from lesa.cli import UsageError, arguments

OPTIONS = {
    **arguments.RUN_OPTIONS,
    "out_dir": "--out",
    "against": "--against",
    "predictors": "--predictor",
    "predictor": "--predictor",
    "folder_or_id": "--predictor",
    "batch_size": "--batch-size",
    "search_samples": "--search-samples",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    from lesa.contenders import AGAINST, against_names

    arguments.add_model(parser)
    arguments.add_inputs(parser)
    arguments.add_run(parser)
    text = (
        "folder or hub id of a predictor, or of predictors for several budgets, which are all compared; can be given "
        "several times, or not at all if all of --against have budgets"
    )
    parser.add_argument("--predictor", default=[], action="append", type=arguments.model, help=text)
    names = f"{', '.join(against_names())}, separated by commas"
    text = f"what to compare with: {names}; NAME-N sets a budget of N computed steps (default: {','.join(AGAINST)})"
    parser.add_argument("--against", type=lambda value: value.split(","), default=[*AGAINST], help=text)
    parser.add_argument("--batch-size", type=arguments.positive, help="samples per pipeline call (default: all)")
    text = "how many samples the search for the best settings uses (default: 4)"
    parser.add_argument("--search-samples", type=arguments.positive, default=4, help=text)
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder for the results")


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import budgets_of, check_model, check_schedules, pipeline_of, predictor_of, prepare, read
    from lesa.cli.trying import explained
    from lesa.evaluation.evaluator import budget_within, check_own_steps
    from lesa.models import adapter_for, features_device

    for name in options.against:
        _, budget = budget_within(name, options.steps)
        if budget is None and not options.predictor:
            raise UsageError(
                f"argument --predictor: without a predictor, {name} has no budget. "
                f"Give a predictor, or write --against {name}-{min(9, options.steps)}."
            )
    kind = check_model(options)
    given: list[tuple[str, int | None]] = []
    for source in options.predictor:
        given += [(source, budget) for budget in budgets_of(source)] or [(source, None)]
    labels = [_label(*each) for each in given]
    for number, label in enumerate(labels):
        if label in labels[:number]:
            raise UsageError(f"argument --predictor: {given[number][0]} is given twice. Give it once.")
    predictors = {label: predictor_of(*each) for label, each in zip(labels, given)}
    samples = read(options, kind)
    check_own_steps([sample.arguments for sample in samples], options.steps, [sample.place for sample in samples])
    pipe = pipeline_of(options)
    check_schedules(predictors, pipe)
    samples = prepare(options, pipe, samples, options.steps)
    device = features_device(pipe, adapter_for(pipe))
    with explained(pipe, samples, options.steps):
        evaluation = lesa.evaluate(
            pipe,
            [sample.arguments for sample in samples],
            {label: predictor.to(device) for label, predictor in predictors.items()},
            against=options.against,
            num_inference_steps=options.steps,
            seed=options.seed,
            batch_size=options.batch_size,
            out_dir=options.out,
            search_samples=options.search_samples,
        )
    show(evaluation, options.out)


def _label(source: str, budget: int | None) -> str:
    """What the predictor is known by in the results: its folder, whatever the current one is, or its hub id."""
    name = str(Path(source).resolve()) if Path(source).is_dir() else source
    return name if budget is None else f"{name}/budget-{budget}"


def show(evaluation, folder: Path) -> None:
    """Prints the table of an evaluation, and where its pictures and figures are."""
    from lesa.evaluation.shown import GIF, MP4

    kinds = (GIF, MP4) if evaluation.has_moving_picture else ()
    moving = [folder / name for name in kinds if (folder / name).exists()]
    *files, last = map(str, (folder / "comparison.png", *moving, folder / "summary.json"))
    print(f"\n{evaluation.table()}\n\nWrote {', '.join(files)} and {last}")
