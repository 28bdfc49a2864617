"""`python -m lesa` is the `lesa` command, also as `accelerate launch -m lesa`."""

from lesa.cli import main

if __name__ == "__main__":
    main()
