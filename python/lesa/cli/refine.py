"""`lesa refine`."""

import lesa
from lesa.cli import arguments

OPTIONS = {
    **arguments.RUN_OPTIONS,
    "out_dir": "--out",
    "trajectories": "--trajectories",
    "folder": "--trajectories",
    "predictor": "--predictor",
    "folder_or_id": "--predictor",
    "rounds": "--rounds",
    "epochs": "--epochs",
    "samples_per_call": "--batch-size",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    arguments.add_inputs(parser)
    parser.add_argument("--predictor", required=True, type=arguments.model, help="folder that `lesa train` wrote")
    text = "folder that `lesa record` wrote for this model"
    parser.add_argument("--trajectories", required=True, type=arguments.existing, help=text)
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder for the refined predictor")
    text = "how often to run the pipeline and train (default: 3)"
    parser.add_argument("--rounds", type=arguments.positive, default=3, help=text)
    text = "passes over the trajectories in each round (default: as many as give about 200 steps of the optimiser)"
    parser.add_argument("--epochs", type=arguments.positive, help=text)
    parser.add_argument(
        "--batch-size", type=arguments.positive, default=1, help="samples per pipeline call (default: 1)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of the training (default: 0)")


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import check_model, check_schedules, device_of, pipeline_of, predictor_of, prepare, read
    from lesa.cli.trying import explained

    kind = check_model(options)
    predictor = predictor_of(options.predictor)
    steps = lesa.Trajectories(options.trajectories).manifest.get("requested_num_inference_steps", 50)
    samples = read(options, kind)
    pipe = pipeline_of(options)
    check_schedules({options.predictor: predictor}, pipe)
    samples = prepare(options, pipe, samples, steps)
    with explained(pipe, samples, steps):
        lesa.refine(
            predictor,
            options.trajectories,
            pipe,
            [sample.arguments for sample in samples],
            out_dir=options.out,
            rounds=options.rounds,
            epochs=options.epochs,
            samples_per_call=options.batch_size,
            seed=options.seed,
            device=device_of(options),
        )
    print(f"Wrote the refined predictor to {options.out}")
