"""`lesa report`."""

import lesa
from lesa.cli import arguments

OPTIONS = {"folder": "--evaluation", "out": "--out"}


def add_arguments(parser) -> None:
    """The options of the command."""
    text = "folder that `lesa evaluate` wrote"
    parser.add_argument("--evaluation", required=True, type=arguments.existing, metavar="DIR", help=text)
    text = "page to write (default: report.html in that folder)"
    parser.add_argument("--out", type=arguments.page, metavar="FILE", help=text)


def run(options) -> None:
    """Runs the command."""
    print(f"Wrote {lesa.report(options.evaluation, options.out)}")
