"""The page `docs/roofline.md`: what the model predicts, what decides it, and the floors of all operations."""

import textwrap
from pathlib import Path

import torch
from shapes import FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FeatureShape

from lesa_kernels import work

from .devices import PRESETS, Device

OUT_CHANNELS = 64  # of the head of FLUX, Qwen-Image and HunyuanVideo: 16 channels, patches of 2 x 2


def predicted_table(figures: dict) -> list[str]:
    """Each operation and size: floor, prediction and ratios, as lines of markdown."""
    lines = [
        "| operation | size | floor, µs | predicted, µs | over the floor | over a copy's time |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, shapes in figures.items():
        for shape, found in shapes.items():
            if "refused" in found:
                lines.append(f"| {name} | {shape} | {found['floor_us']:.1f} | refused: {found['refused']} | | |")
                continue
            times = f"{found['floor_us']:.1f} | {found['predicted_us']:.1f}"
            lines.append(f"| {name} | {shape} | {times} | {found['ratio']:.2f} | {found['ratio_to_copy']:.2f} |")
    return lines


def details_table(figures: dict) -> list[str]:
    """What decides the time of each launch."""
    lines = [
        "| operation, size | programs | of them at a time on a multiprocessor | rounds | idle | registers | shared, KB "
        "| in flight, KB | instructions per byte | first data, µs | issue, µs | memory, µs | cache, µs | scratch, MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, shapes in figures.items():
        for shape, found in shapes.items():
            for each in found.get("launches", ()):
                place = [each[key] for key in ("programs", "resident", "waves", "idle", "registers")]
                memory = f"{each['shared_kb']:.0f} | {each['in_flight_kb']:.0f} | {each['instructions_per_byte']:.1f}"
                times = [f"{each[key]:.1f}" for key in ("first_data_us", "issue_us", "memory_us", "cache_us")]
                cells = [f"{name}, {shape}", *map(str, place), memory, *times, f"{each['scratch_mb']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def meetings_table(figures: dict) -> list[str]:
    """The launches whose programs meet."""
    lines = [
        "| operation, size | finishing a tile, µs | tiles that one program finishes at most | a fair share "
        "| predicted, µs | if each program began at another tile, µs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, shapes in figures.items():
        for shape, found in shapes.items():
            for each in found.get("launches", ()):
                if "finish_us" in each:
                    tiles = f"{each['finish_us']:.1f} | {each['most_finished']} | {each['fair']:.1f}"
                    times = f"{each['predicted_us']:.0f} | {each['rotated_us']:.0f}"
                    lines.append(f"| {name}, {shape} | {tiles} | {times} |")
    return lines


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


FLOORS = {str(shape): on_features(shape) for shape in (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO)}
FLOORS["65536 rows, 256 to 256, G = 8, p = 3"] = on_layers()


def floors_table(device: Device) -> list[str]:
    """The floors as lines of markdown."""
    lines = [
        "| size | operation | MB | GFLOP | FLOP per byte | floor, µs | bound by |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for size, operations in FLOORS.items():
        for name, amounts in operations.items():
            moved, flops = amounts["bytes"], amounts["flops"]
            bound = "bandwidth" if moved / device.bandwidth > flops / device.flops else "products"
            figures = (
                f"{moved / 1e6:.1f} | {flops / 1e9:.2f} | {flops / moved:.1f} | {device.floor(moved, flops) * 1e6:.1f}"
            )
            lines.append(f"| {size} | {name} | {figures} | {bound} |")
    return lines


def constants_table(device: Device) -> list[str]:
    """The model's constants, with their sources."""
    reached = ", ".join(f"{share:.3f}" for _, share in device.reached)
    rows = [
        ("bandwidth of the memory", f"{device.bandwidth / 1e12:.2f} TB/s", "D"),
        ("of which reads, two reads and a write, a copy reach", reached, "G, V"),
        ("dense bfloat16 products", f"{device.flops / 1e12:.0f} TFLOPS", "D"),
        ("multiprocessors, clock", f"{device.multiprocessors}, {device.clock / 1e9:.2f} GHz", "D"),
        ("second-level cache", f"{device.l2_bytes >> 20} MB, {device.l2_per_clock:.0f} bytes per clock", "D, G"),
        ("latency of memory, idle", f"{device.memory_latency} cycles", "G"),
        (
            "latency of the cache, near and far half",
            f"{device.l2_latency} and {device.far_latency} cycles",
            "G",
        ),
        ("time between two kernels in a graph", f"{device.launch_seconds * 1e6:.2f} µs", "G"),
        ("until a program takes the place of another one", f"{device.replace_seconds * 1e6:.2f} µs", "G"),
        ("a fence, an atomic addition", f"{device.far_latency} cycles each", "A"),
        ("results of arithmetic per clock, registers, warps, shared memory", "see `devices.py`", "C"),
        ("mma.sync, of wgmma's rate; latencies of shared memory and shuffles", "0.63; see `multiprocessor.py`", "L"),
        ("how instructions hold their stalls and barriers", "", "J"),
        ("variation of each duration", "at most 5 %", "A"),
    ]
    return ["| constant | value | source |", "|---|---|---|"] + [f"| {' | '.join(row)} |" for row in rows]


SOURCES = """Sources:

- D: NVIDIA's datasheets and whitepapers. The clock is the one that the rate of products follows from.
- G: Dominik Ernst, [gpu-benches](https://github.com/RRZE-HPC/gpu-benches), results of a GH200 (4.02 TB/s, 1.98 GHz),
  which has the multiprocessors of an H200 and other memory.
- V: Voltage Park, vpbenchmarking: copies in the memory of an H100 SXM.
- C: CUDA C++ Programming Guide, the tables of arithmetic throughput and of compute capabilities.
- L: W. Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level Analysis",
  2025; "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking", 2024.
- J: Z. Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018.
- A: an assumption of ours.
"""

HOW = """## How the model works

1. Each public call is compiled as it would be launched. That gives the grid, the registers and the shared memory, so
   the number of programs on a multiprocessor.
2. A program for one scheduler of a multiprocessor executes the compiled instructions of its warps, in order, with the
   stalls and barriers that the compiler wrote into them. Each unit takes its time for each instruction. Loads return
   after the latency of the memory or of the cache; the cache has a limit of its bandwidth.
3. The latency of the memory rises with its use, as measured [G]: with 0.24, 0.44, 0.71 and 0.94 of its bandwidth in
   use, a load takes 1.04, 1.2, 1.6 and 4.3 times as long. The model finds the time at which use and latency agree.
4. Where programs meet, all programs of the launch are simulated: each tile takes its time, varied by up to 5 %, and the
   memory's bandwidth is shared by the programs that ask for data. The last program that arrives at a tile finishes it.
5. Scratch memory beyond the second-level cache is written to memory and read from it once.

The model does not know: misses of the instruction cache, conflicts of the banks of shared memory, clocks that fall
under load, the translation of addresses, and which half of the cache holds what. It takes all data as cold. We expect
it to be wrong by up to 30 %; a comparison of two kernels is more reliable than a time.
"""


BELOW_PREDICTED = """
Features are bfloat16. Newton reads four anchors. The KAN layer has G = 8 and p = 3. Its floor counts the p + 1 bases
that are not zero. An implementation that multiplies all bases does 2.4 times as much."""

DECIDES = """## What decides them

"In flight" are features that can be on their way to a multiprocessor at a time; 13 KB are what the bandwidth times the
latency of an idle memory needs, and it takes a few times more to come close to the bandwidth. "Issue", "memory" and
"cache" are the times that a scheduler, the memory and the second-level cache need for their work, each alone. "First
data" is the time until the first features are there. "Idle" are multiprocessors without a program."""


_WHOLE = {"break_long_words": False, "break_on_hyphens": False}
_ITEM = _WHOLE | {"initial_indent": "- ", "subsequent_indent": "  "}


def page(preset: str, figures: dict, chart: str) -> str:
    """The page as markdown."""
    device = PRESETS[preset]
    command = "python benchmarks/static_model.py" + ("" if preset == "H200" else f" --preset {preset}")
    text = f"""# Roofline

**No time on this page is a measurement.** No kernel has run on a GPU. "Predicted" is what a model says from the
compiled code and the launch. A floor is the least time that an operation can take: the bytes that it must move, or the
FLOPs that it must do (`lesa_kernels/work.py`), over the rate of the datasheet.

Made by `{command} --json FILE --out docs/roofline.md`.

Device: {device.name}, {device.bandwidth / 1e12:.2f} TB/s of memory bandwidth and {device.flops / 1e12:.0f} TFLOPS of
dense bfloat16 products. No kernel reaches the datasheet's bandwidth: a copy reaches {100 * device.reached[-1][1]:.0f} %
of it. The last column is the ratio to the time of a copy of as many bytes. The benchmarks print the same ratio for
times that they measure.

![Predictions]({chart})

## Predicted times

"""
    parts = [
        text + "\n".join(predicted_table(figures)),
        BELOW_PREDICTED,
        DECIDES,
        "\n".join(details_table(figures)),
    ]
    meetings = meetings_table(figures)
    if len(meetings) > 2:
        parts += ["## Programs that meet\n", "\n".join(meetings)]
    parts += [review(figures), HOW, "## Constants", "\n".join(constants_table(device)), SOURCES, FLOORS_TEXT]
    parts.append("\n".join(floors_table(device)))
    return "\n\n".join(_filled(part.strip("\n")) for part in parts) + "\n"


def _filled(text: str) -> str:
    """Markdown with the lines of its paragraphs filled again, since figures have changed their lengths."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("- "):
            items = block.removeprefix("- ").split("\n- ")
            block = "\n".join(textwrap.fill(" ".join(item.split()), 120, **_ITEM) for item in items)
        elif block[0] not in "|#!" and not block[0].isdigit():
            block = textwrap.fill(" ".join(block.split()), 120, **_WHOLE)
        blocks.append(block)
    return "\n\n".join(blocks)


# An earlier review by hand of the same kernels, at flux-1024px: µs with the convoy and without it.
EARLIER = {
    "newton predict, rank 32": ("740", "120"),
    "predict velocity, rank 0": ("110 to 130", "55"),
    "predict velocity, rank 32": ("1150", "280"),
}


def review(figures: dict) -> str:
    """What an earlier review said of the kernels in `figures`, and why the model says something else."""
    size = str(FLUX)
    found = {name: figures[name][size]["launches"][0] for name in EARLIER}
    rows = [
        f"| {name} | {convoy} | {found[name]['predicted_us']:.0f} | {without} | {found[name]['rotated_us']:.0f} |"
        for name, (convoy, without) in EARLIER.items()
    ]
    residual, velocity, both = found.values()
    plain = figures["newton predict, rank 0"][size]["launches"][0]
    large = {name: figures[name][str(HUNYUAN_VIDEO)]["launches"][0]["scratch_mb"] for name in EARLIER}
    return f"""## Compared with an earlier review

An earlier review by hand read the same kernels. These are its times and those of this model at {size}, in µs. All
programs walk the tiles in one order, so the program that finishes one tile is late for the next one, and finishes that
too: a convoy.

| operation | review | model | review, no convoy | model, each program begins at another tile |
|---|--:|--:|--:|--:|
{chr(10).join(rows)}

Both find the convoy: one program finishes {residual["most_finished"]}, {velocity["most_finished"]} and
{both["most_finished"]} tiles, all of its share. Both find {large["predict velocity, rank 0"]:.0f} and
{large["predict velocity, rank 32"]:.0f} MB of scratch memory at {HUNYUAN_VIDEO}. The times differ for these reasons:

- **newton predict, rank 32.** Finishing a tile takes {residual["finish_us"]:.1f} µs here and 12 in the review. In each
  of its 24 rounds the program waits for the tile that another one wrote, which may lie in the far half of the cache,
  for a copy of the map, and at four barriers. These waits add up, since nothing else runs on that multiprocessor.
- **predict velocity, rank 0.** The first features come after {velocity["first_data_us"]:.1f} µs here; the review took
  5. The compiled code loads the coefficients in more than ten groups, and each group waits for the one before it, with
  the latency of the memory. Finishing takes {velocity["finish_us"]:.1f} instead of 3.3 µs.
- **predict velocity, rank 32.** Finishing takes {both["finish_us"]:.1f} instead of 7 µs. Without the convoy, a tile
  takes {both["round_us"]:.1f} instead of 2.0 µs.
- **newton predict, rank 0.** The review said 4 µs or more for the weights of the anchors. Here the first features come
  after {plain["first_data_us"]:.1f} µs: four warps of 1700 instructions keep a scheduler busy for 3.7 µs, and the loads
  among them wait for each other.
- **dense predict.** The review expected 5 to 20 % over a bare product. Here the cache decides: a step needs 48 bytes
  per clock and multiprocessor, and 37 are measured [G]. A bare product with tiles of this size has the same limit.
- **KAN layer.** Both find that comparisons and selections keep the tensor cores waiting.
"""


FLOORS_TEXT = """## Floors of all operations

Features and the weights of layers are bfloat16, the parameters of predictors are float32. MB are 10^6 bytes. Newton
reads four anchors, which is its default. Its weighted sum does not use tensor cores; it is so small that the bandwidth
decides. No floor includes what the programs of one kernel pass to each other through memory."""


def draw(device: Device, figures: dict, file: Path) -> None:
    """Draws the predicted ratio of each operation to its floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(shape for shapes in figures.values() for shape in shapes))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ticks, names, place = [], [], 0.0
    for name, shapes in figures.items():
        ticks.append(place + (len(shapes) - 1) / 2)
        names.append(name)
        for shape, found in shapes.items():
            if "ratio" in found:
                axes.barh(place, found["ratio"], color=f"C{sizes.index(shape)}")
                axes.text(found["ratio"] * 1.03, place, f"{found['predicted_us']:.0f} µs", va="center", fontsize=7)
            place += 1
        place += 0.7
    axes.axvline(1, color="0.3")
    most = max(found.get("ratio", 1) for shapes in figures.values() for found in shapes.values())
    axes.set(xscale="log", yticks=ticks, xlabel="predicted time over the floor", xlim=(0.9, 1.6 * most))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{number}", label=size) for number, size in enumerate(sizes)]
    axes.legend(handles=handles, fontsize=8)
    axes.set_title(f"{device.name}: predictions of a model, not measurements")
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)
