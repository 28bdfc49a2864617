"""`python -m lesa` is the `lesa` command, also as `accelerate launch -m lesa`."""

from lesa.cli import main

main()
