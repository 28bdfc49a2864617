"""The floor of each operation at each size: `python benchmarks/roofline.py --preset H200 --out docs/roofline.md`.

An operation can't be faster than its bytes over the memory's bandwidth, nor than its FLOPs over the rate of products.
Both amounts are those of `lesa_kernels/work.py`, which the benchmarks use too. The two rates are a datasheet's
(`--preset`), given (`--bandwidth`, `--tflops`), or, without any of these, measured on the GPU at hand.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from floors import Floors
from shapes import FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FeatureShape

from lesa_kernels import work
from lesa_kernels.work import DATASHEETS

OUT_CHANNELS = 64  # of the head of FLUX, Qwen-Image and HunyuanVideo: 16 channels, patches of 2 x 2


@dataclass(frozen=True)
class Device:
    """The two rates.

    Args:
        name: of the device.
        bandwidth: of its memory, bytes per second.
        flops: per second, of products of bfloat16 accumulated in float32, dense.
        source: where the rates come from, the end of a sentence.
    """

    name: str
    bandwidth: float
    flops: float
    source: str

    def floor(self, bytes: int, flops: int) -> float:
        """Seconds."""
        return max(bytes / self.bandwidth, flops / self.flops)


PRESETS = {name: Device(*rates, "from NVIDIA's datasheet, not measured") for name, rates in DATASHEETS.items()}


def measured(device: torch.device) -> Device:
    """The GPU at hand, as the benchmarks measure it."""
    floors = Floors(device)
    rates = floors.copy_bandwidth(), floors.matmul_rate(torch.bfloat16)
    return Device(torch.cuda.get_device_name(device), *rates, "measured here: of `Tensor.copy_` and `torch.mm`")


def on_features(shape: FeatureShape) -> dict[str, dict[str, int]]:
    """Operation -> its work on features of that shape."""
    bfloat16 = (shape.batch, shape.tokens, shape.dim, torch.bfloat16)
    float8 = (shape.batch, shape.tokens, shape.dim, torch.float8_e4m3fn)
    found = {}
    for rank in (0, 32):
        found[f"newton predict, rank {rank}"] = work.newton_predict(*bfloat16, rank=rank)
        found[f"newton predict, rank {rank}, float8 ring"] = work.newton_predict(*float8, rank=rank)
        found[f"predict velocity, rank {rank}"] = work.predict_velocity(*bfloat16, OUT_CHANNELS, rank=rank)
        found[f"predict velocity, rank {rank}, float8 ring"] = work.predict_velocity(*float8, OUT_CHANNELS, rank=rank)
    for history in (4, 6, 8):
        found[f"dense predict, K = {history}"] = work.dense_predict(*bfloat16, history)
    found["ring push"] = work.ring_push(*bfloat16)
    found["ring push, float8 ring"] = work.ring_push(*bfloat16, stored=torch.float8_e4m3fn)
    found["ring gather"] = work.ring_gather(*bfloat16)
    found["ring gather, float8 ring"] = work.ring_gather(*float8)
    return found


def on_layers() -> dict[str, dict[str, int]]:
    """Operation -> its work for a KAN layer of 256 to 256 features."""
    layer = (65536, 256, 256, torch.bfloat16, 8, 3)
    forward, backward = work.bspline_kan(*layer), work.bspline_kan_backward(*layer)
    return {"KAN layer, forward": forward, "KAN layer, forward and backward": work.both(forward, backward)}


TABLES = {str(shape): on_features(shape) for shape in (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO)}
TABLES["65536 rows, 256 to 256, G = 8, p = 3"] = on_layers()


def table(device: Device) -> list[str]:
    """The floors as lines of markdown."""
    lines = [
        "| size | operation | MB | GFLOP | FLOP per byte | floor, µs | bound by |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for size, operations in TABLES.items():
        for name, amounts in operations.items():
            moved, flops = amounts["bytes"], amounts["flops"]
            bound = "bandwidth" if moved / device.bandwidth > flops / device.flops else "products"
            figures = (
                f"{moved / 1e6:.1f} | {flops / 1e9:.2f} | {flops / moved:.1f} | {device.floor(moved, flops) * 1e6:.1f}"
            )
            lines.append(f"| {size} | {name} | {figures} | {bound} |")
    return lines


def page(device: Device, command: str, chart: str) -> str:
    """The page as markdown."""
    text = f"""# Roofline

Made by `{command}`. **No time on this page is a measurement.** The times are floors: the least time that an operation
can take on a device. A floor is computed from the bytes that the operation must move, the FLOPs that it must do
(`lesa_kernels/work.py`), and two rates of the device. The benchmarks print the ratio of a measured time to its floor.

Device: {device.name}, {device.bandwidth / 1e12:.2f} TB/s of memory bandwidth and {device.flops / 1e12:.0f} TFLOPS of
dense bfloat16 products, {device.source}.

![Roofline]({chart})

Features and the weights of layers are bfloat16, the parameters of predictors are float32. MB are 10^6 bytes. Newton
reads four anchors, which is its default. Its weighted sum does not use tensor cores; it is so small that the bandwidth
decides. For the KAN layer, only the p + 1 bases that are not zero are counted. An implementation that multiplies all
G + p bases on tensor cores does (1 + G + p) / (2 + p) times as much, here 2.4 times.

No floor includes what the programs of one kernel pass to each other through memory. For flux-1024px in bfloat16 this is
13 MB, written and read once, for a velocity of rank 0; 102 MB for a velocity of rank 32; and 13 MB, and the forecast
once more, for newton predict of rank 32. What they cost depends on whether they stay in the second-level cache.

"""
    return text + "\n".join(table(device)) + "\n"


def draw(device: Device, file: Path) -> None:
    """Draws the roof and each operation below it, at the rate that its floor allows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(0.3, 1e4, 200)
    axes.loglog(intensity, np.minimum(intensity * device.bandwidth, device.flops) / 1e12, color="0.3")
    markers = dict(zip(TABLES, "osD^"))
    colours = {}
    for size, operations in TABLES.items():
        for name, amounts in operations.items():
            if amounts["flops"] == 0:
                continue
            kind = name.partition(",")[0]
            colour = colours.setdefault(kind, f"C{len(colours)}")
            x = amounts["flops"] / amounts["bytes"]
            axes.plot(x, min(x * device.bandwidth, device.flops) / 1e12, markers[size], color=colour, alpha=0.7)
    entries = [(kind, "o", colour) for kind, colour in colours.items()]
    entries += [(size, marker, "0.5") for size, marker in markers.items()]
    handles = [plt.Line2D([], [], marker=m, linestyle="", color=colour, label=label) for label, m, colour in entries]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.set(xlabel="FLOP per byte", ylabel="attainable TFLOPS", title=f"{device.name}: floors, not measurements")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="rates of a datasheet")
    parser.add_argument("--bandwidth", type=float, help="of the memory, GB/s; with --tflops")
    parser.add_argument("--tflops", type=float, help="of dense bfloat16 products; with --bandwidth")
    parser.add_argument("--out", type=Path, help="page to write; its chart goes beside it")
    options = parser.parse_args(argv)
    given = (options.bandwidth, options.tflops)
    if (None in given) != (given == (None, None)):
        parser.error("--bandwidth and --tflops go together")
    if options.preset and given != (None, None):
        parser.error("pass --preset, or --bandwidth and --tflops")
    if None not in given and min(given) <= 0:
        parser.error(f"--bandwidth and --tflops must be above 0, but got {given[0]} and {given[1]}")

    if options.preset:
        device, command = PRESETS[options.preset], f" --preset {options.preset}"
    elif None not in given:
        device = Device("a device", given[0] * 1e9, given[1] * 1e12, "as given")
        command = f" --bandwidth {given[0]:g} --tflops {given[1]:g}"
    elif torch.cuda.is_available():
        device, command = measured(torch.device("cuda")), ""
    else:
        parser.error("there is no GPU to measure; pass --preset, or --bandwidth and --tflops")
    print("\n".join(table(device)))
    if options.out is not None:
        chart = options.out.with_suffix(".png")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page(device, f"python benchmarks/roofline.py{command}", chart.name))
        draw(device, chart)
        print(f"wrote {options.out} and {chart}")


if __name__ == "__main__":
    main()
