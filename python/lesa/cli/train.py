"""`lesa train`."""

import lesa
from lesa.cli import arguments

_OF_THE_CONFIG = ("mixer", "rank", "hidden", "history_length", "stage_bounds", "options")

_CONFIG_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in (*_OF_THE_CONFIG, "schedule")}
_CONFIG_OPTIONS["options"] = "--option"
OPTIONS = {
    "out_dir": "--out",
    "trajectories": "--trajectories",
    "folder": "--trajectories",
    "budget": "--budget",
    "epochs": "--epochs",
    "guided_epochs": "--epochs",
    "controlled": "--controlled",
    "seed": "--seed",
    "device": "--device",
    **_CONFIG_OPTIONS,
    **{f"config.{name}": option for name, option in _CONFIG_OPTIONS.items()},
}


def add_arguments(parser) -> None:
    """The options of the command."""
    text = "folder that `lesa record` wrote"
    parser.add_argument("--trajectories", required=True, type=arguments.existing, help=text)
    parser.add_argument("--out", required=True, type=arguments.folder, help="folder for the predictor")
    text = f"{arguments.SCHEDULE} (default: nine spread steps)"
    parser.add_argument("--schedule", type=arguments.schedule, help=text)
    text = "number of computed steps, instead of --schedule; lesa searches for the best steps"
    parser.add_argument("--budget", type=arguments.positive, help=text)
    text = "kind of predictor: newton, dense, lesa or l2p (default: newton)"
    parser.add_argument("--mixer", type=arguments.mixer, help=text)
    text = "setting of the mixer, such as streams=2 for lesa; may be repeated (default: those of the mixer)"
    parser.add_argument(
        "--option", dest="options", action="append", type=arguments.option, metavar="NAME=VALUE", help=text
    )
    text = "rank of the linear residual, where the mixer has one; 0 for none (default: 32)"
    parser.add_argument("--rank", type=arguments.natural, help=text)
    text = "number of spline units (default: that of the mixer)"
    parser.add_argument("--hidden", type=arguments.positive, help=text)
    text = "how many stored features to use: one number, or one per noise stage (default: that of the mixer)"
    parser.add_argument("--history-length", type=arguments.lengths, help=text)
    text = "noise levels between the noise stages, or auto to search for them (default: those of the mixer)"
    parser.add_argument("--stage-bounds", type=arguments.stage_bounds, help=text)
    text = (
        "passes over the trajectories in closed loop (default: as many as give about 600 steps of the optimiser); "
        "guided passes come first, how many depends on the mixer; with --controlled, all passes are guided"
    )
    parser.add_argument("--epochs", type=arguments.positive, help=text)
    parser.add_argument("--controlled", action="store_true", help="train for `lesa generate --tolerance`")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of the training (default: 0)")
    arguments.add_device(parser)


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import device_of
    from lesa_kernels import PredictorConfig

    trajectories = lesa.Trajectories(options.trajectories)
    of_config = {name: getattr(options, name) for name in _OF_THE_CONFIG if getattr(options, name) is not None}
    find_stages = of_config.get("stage_bounds") == "auto"
    if find_stages:
        del of_config["stage_bounds"]
    if options.options:
        of_config["options"] = dict(options.options)
    config = PredictorConfig(trajectories.feature_dim, **of_config) if of_config else None
    more = {name: getattr(options, name) for name in ("epochs", "budget") if getattr(options, name) is not None}
    more |= {"controlled": True} if options.controlled else {}
    more |= {"find_stages": True} if find_stages else {}
    device = device_of(options)
    predictor = lesa.train(
        trajectories, config, options.schedule, out_dir=options.out, seed=options.seed, device=device, **more
    )
    config = predictor.config
    if find_stages:
        bounds = ", ".join(f"{bound:.3g}" for bound in config.stage_bounds)
        print(f"Found {config.num_stages} noise stages, with bounds at {bounds}" if bounds else "Found 1 noise stage")
    steps = ",".join(map(str, config.schedule or ()))
    print(f"Wrote the predictor, which computes the steps {steps}, to {options.out}")
