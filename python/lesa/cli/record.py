"""`lesa record`."""

import lesa
from lesa.cli import arguments

OPTIONS = {
    **arguments.RUN_OPTIONS,
    **arguments.CONDITION_OPTIONS,
    "out_dir": "--out",
    "requested_num_inference_steps": "--steps",
    "tokens_per_sample": "--tokens-per-sample",
    "batch_size": "--batch-size",
    "inputs_digest": "--inputs (digest)",
    "folder": "--out",
    "transformer": "--model (weights)",
    "family": "--model (family)",
    "feature_dim": "--model (feature_dim)",
    "head_eps": "--model (head_eps)",
    "samples": "--inputs (samples)",
    "dtype": "--dtype",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    arguments.add_inputs(parser)
    arguments.add_run(parser)
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder for the trajectories")
    parser.add_argument(
        "--tokens-per-sample", type=arguments.positive, help="image tokens to keep, chosen at random (default: all)"
    )
    parser.add_argument(
        "--batch-size", type=arguments.positive, default=1, help="samples per pipeline call (default: 1)"
    )


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import check_model, pipeline_of, prepare, read
    from lesa.cli.trying import explained

    samples = read(options, check_model(options))
    pipe = pipeline_of(options)
    samples = prepare(options, pipe, samples, options.steps)
    with explained(pipe, samples, options.steps):
        trajectories = lesa.record(
            pipe,
            [sample.arguments for sample in samples],
            options.out,
            num_inference_steps=options.steps,
            tokens_per_sample=options.tokens_per_sample,
            seed=options.seed,
            batch_size=options.batch_size,
        )
    done = trajectories.recorded
    made = sum(number not in done.kept for number in trajectories.samples)
    more = f"; samples that were there already: {len(done.kept)}" if done.kept else ""
    more += f"; damaged samples that were recorded again: {len(done.again)}" if done.again else ""
    print(f"Wrote {made} trajectories of {trajectories.num_inference_steps} steps to {options.out}{more}")
