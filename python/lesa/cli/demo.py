"""`lesa demo`."""

import time
from pathlib import Path

from lesa.cli import arguments

OPTIONS = {"out_dir": "--export"}


def add_arguments(parser) -> None:
    """The options of the command."""
    models = "digits: a FLUX model (default); photos: a Qwen-Image model with guidance; video: a HunyuanVideo model; "
    models += "few-step: digits in 8 steps"
    choices = ("digits", "photos", "video", "few-step")
    parser.add_argument("--model", choices=choices, default="digits", help=models)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--out", type=arguments.folder, default=Path("demo-out"), help="folder for the results (default: demo-out)"
    )
    choice.add_argument(
        "--export", type=arguments.folder, metavar="DIR", help="write the model and its inputs to DIR, and draw nothing"
    )


def run(options) -> None:
    """Runs the command."""
    from lesa.cli.evaluate import show
    from lesa.cli.loading import quiet_libraries
    from lesa.demo.run import export, run_demo

    quiet_libraries()
    if options.export is not None:
        at_once, *by_steps = export(options.export, options.model)
        print(f"Wrote the model and its inputs to {options.export}. This makes a predictor, and says how good it is:\n")
        print(f"  {at_once}\n\nOr do each step by a command of its own, one after the other:\n")
        print("\n".join(f"  {command}" for command in by_steps))
        return
    duration = "This takes up to two minutes on two idle CPU cores, and up to five on busy ones."
    print(f"The bundled {options.model} model: all steps, then fewer computed ones. {duration}", flush=True)
    start = time.perf_counter()
    show(run_demo(options.out, model=options.model), options.out)
    print(f"The demo took {time.perf_counter() - start:.0f} s.")
