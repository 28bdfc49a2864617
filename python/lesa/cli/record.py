"""`lesa record`."""

from pathlib import Path

import lesa
from lesa.cli import arguments

OPTIONS = {
    "out_dir": "--out",
    "num_inference_steps": "--steps",
    "requested_num_inference_steps": "--steps",
    "tokens_per_sample": "--tokens-per-sample",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "inputs": "--inputs",
    "inputs_digest": "--inputs (digest)",
    "file": "--inputs",
    "folder": "--out",
    "pipe": "--model",
    "pipeline": "--model (pipeline)",
    "transformer": "--model (weights)",
    "family": "--model (family)",
    "feature_dim": "--model (feature_dim)",
    "head_eps": "--model (head_eps)",
    "samples": "--inputs (samples)",
    "dtype": "--dtype",
    "dtypes": "--dtype",
    **{name: f"--model ({name})" for name in ("scheduler", "pipeline_config", "adapters", "fused_loras", "weights")},
    "quantisation": "--model (quantisation)",
}


def add_arguments(parser) -> None:
    """The options of the command."""
    arguments.add_model(parser)
    arguments.add_inputs(parser)
    arguments.add_run(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder for the trajectories")
    parser.add_argument(
        "--tokens-per-sample", type=arguments.positive, help="image tokens to keep, chosen at random (default: all)"
    )
    parser.add_argument(
        "--batch-size", type=arguments.positive, default=1, help="samples per pipeline call (default: 1)"
    )


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.loading import inputs_of, pipeline_of

    pipe = pipeline_of(options)
    trajectories = lesa.record(
        pipe,
        inputs_of(options, pipe),
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
