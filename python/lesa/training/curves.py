"""The picture of the losses of a training."""

from pathlib import Path

from lesa.artifacts import whole_file


def plot_losses(losses: dict[str, list[float]], closed_loop: int | None, file: Path, unit: str = "epoch") -> None:
    """Draws the losses over the epochs or other units, and where the closed loop begins if that is after some.

    Losses that may be negative, such as logarithms, have a linear scale.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name, marker="o" if len(values) == 1 else None)
    if closed_loop:
        axes.axvline(closed_loop + 0.5, color="grey", linestyle=":", label="closed loop begins")
    axes.set(xlabel=unit, ylabel="loss", title="Training of the predictor")
    if all(value >= 0 for values in losses.values() for value in values):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
