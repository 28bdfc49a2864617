"""`lesa env`."""


def add_arguments(parser) -> None:
    """The command has no options."""


def run(options) -> None:
    """Runs the command."""
    from lesa_kernels.env_report import main

    main()
