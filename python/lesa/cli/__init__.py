"""The `lesa` command. Each command has a module of its own, with `add_arguments(parser)` and `run(options)`."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Mapping

from lesa.cli.quiet import discard_output, printing_everything, quiet_imports
from lesa.cli.together import is_first, may_print, printing_once, work_alone
from lesa.messages import is_message
from lesa_kernels import __version__

COMMANDS = {
    "demo": "draw pictures with a bundled model and its predictors, and compare them",
    "fit": "make a predictor for a model: record, search, train, refine and test in one command",
    "record": "record what a model computes, to train a predictor on it",
    "train": "train a predictor on recorded trajectories",
    "refine": "train a predictor further, on runs in which it is used",
    "generate": "generate pictures with most steps predicted",
    "evaluate": "compare predictors with the full run, fewer steps and other caches",
    "report": "make one HTML page from what `lesa evaluate` wrote",
    "estimate": "show what predicting most steps would save, without running anything",
    "env": "print the versions and devices for a bug report",
}
RESUMABLE = ("fit", "record", "train", "refine", "evaluate")
"""Commands that continue after an interruption, and whose work several processes can share."""


class UsageError(Exception):
    """What the user can correct; the message is shown on one line."""

    lesa_message = True


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command. If it cannot, it raises `SystemExit` with code 2 and prints one line to stderr.

    Under `torchrun` and `accelerate launch`, the processes share the work of the commands that can continue after an
    interruption. Only the first process works on other commands.

    If the reader of its output ends before it does, it raises `SystemExit` with code 141, and prints nothing.

    Args:
        arguments: those of the command line. Default: `sys.argv[1:]`.
    """
    with printing_everything():
        try:
            try:
                with printing_once():
                    _run(sys.argv[1:] if arguments is None else arguments)
            finally:
                if sys.stdout is not None:  # it was closed before the start
                    sys.stdout.flush()
        except OSError as error:
            discard_output()
            if isinstance(error, BrokenPipeError):
                raise SystemExit(141) from None
            raise _exit(f"error: the output cannot be written: {error}", 2) from None


def _run(arguments: list[str]) -> None:
    try:
        options = parse(arguments)
    except UsageError as error:
        raise _exit(f"error: {error}", 2, error) from None
    if options.command not in RESUMABLE:
        if not is_first():
            return
        work_alone()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its missing optional parts are of no interest here
    quiet_imports()
    command = _module(options.command)
    try:
        command.run(options)
    except KeyboardInterrupt as error:
        resume = "; the same command continues where it stopped" if options.command in RESUMABLE else ""
        raise _exit(f"interrupted{resume}", 130, error) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if is_message(error):
            line = f"error: {_with_options(str(error), getattr(command, 'OPTIONS', {}))}"
            raise _exit(line, 2, error) from None
        if may_print(error):
            raise
        raise SystemExit(1) from None


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of one command line; `command` is the name of the command.

    Raises:
        UsageError: the command line is wrong.
    """
    return parser_of(arguments[0] if arguments else None).parse_args(arguments)


def parser_of(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of one of them: the modules of the others are not loaded."""
    parser = _Parser(prog="lesa", description="Learned feature forecasting for diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"lesa {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def _module(command: str):
    return importlib.import_module(f"lesa.cli.{command}")


def _with_options(message: str, options: Mapping[str, str]) -> str:
    """The message with the names of options and commands instead of the library's arguments and functions.

    A part of an argument is named behind its option: "`predictor.config.rank`" becomes "`--predictor` (config.rank)".
    """

    def option(match: re.Match) -> str:
        if match[1].removeprefix("lesa.") in COMMANDS:
            return f"`{match[1].replace('.', ' ')}`"
        name, (first, _, rest), index = match[1], match[1].partition("."), match[2] or ""
        if name in options:
            return f"`{options[name]}{index}`"
        return f"`{options[first]}{index}` ({rest})" if first in options and rest else match[0]

    return re.sub(r"`([A-Za-z_.]+)(\[[^`]*\])?`", option, message)


def _exit(line: str, code: int, error: BaseException | None = None) -> SystemExit:
    if may_print(error):
        print(f"lesa: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return SystemExit(code)
