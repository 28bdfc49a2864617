"""The page `docs/roofline.md`: what the model predicts, what decides it, and the floors of all operations."""

import json
import textwrap
from pathlib import Path

import torch
from shapes import FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FeatureShape

from lesa_kernels import work

from .devices import PRESETS, Device

OUT_CHANNELS = 64  # of the head of FLUX, Qwen-Image and HunyuanVideo: 16 channels, patches of 2 x 2


BEFORE = json.loads((Path(__file__).parents[1] / "results" / "predicted" / "h200-before.json").read_text())
"""What this model says of the kernels of 28 November 2026 on an H200, when each predicted step was one launch."""

TAKES_PLACE_OF = {
    "forecast, rank 0": "newton predict, rank 0",
    "forecast, rank 32": "newton predict, rank 32",
    "skipped step, rank 0": "predict velocity, rank 0",
    "skipped step, rank 32": "predict velocity, rank 32",
    "forecast outside a run, rank 0": "newton predict, rank 0",
}
# Ratios to the floor that the kernels are meant to reach.
TARGETS = {
    "forecast, rank 0": 1.15,
    "forecast, rank 32": 1.15,
    "skipped step, rank 0": 1.4,
    "skipped step, rank 32": 1.6,
}
TARGET_OF_VIDEO = 1.15


def target_of(name: str, shape: str) -> float | None:
    """The ratio to the floor that an operation is meant to reach, if there is one."""
    if name in TARGETS and shape == str(HUNYUAN_VIDEO):
        return TARGET_OF_VIDEO
    return TARGETS.get(name)


def predicted_table(figures: dict, before: dict | None = None) -> list[str]:
    """Each operation and size: floor, prediction and ratios, as lines of markdown; beside those of `before`."""
    lines = [
        "| operation | size | floor, µs | predicted, µs | over the floor | target | over a copy's time "
        "| before, µs | before, over the floor |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, shapes in figures.items():
        for shape, found in shapes.items():
            if "refused" in found:
                lines.append(f"| {name} | {shape} | {found['floor_us']:.1f} | refused: {found['refused']} | | | | | |")
                continue
            old = (before or {}).get(TAKES_PLACE_OF.get(name, name), {}).get(shape)
            target = target_of(name, shape) if before else None  # they are for an H200
            cells = [
                f"{found['floor_us']:.1f}",
                f"{found['predicted_us']:.1f}",
                f"{found['ratio']:.2f}",
                "" if target is None else f"{target} {'met' if found['ratio'] <= target else 'missed'}",
                f"{found['ratio_to_copy']:.2f}",
                "" if old is None else f"{old['predicted_us']:.1f}",
                "" if old is None else f"{old['ratio']:.2f}",
            ]
            lines.append(f"| {name} | {shape} | {' | '.join(cells)} |")
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

VERSIONS = """## Versions of the model

The model was changed once, when the stream kernels came. Since then the programs that follow others on a multiprocessor
find in the second-level cache what all programs read; the time between two tiles of one program is counted as part of
the stream, since other programs use the memory meanwhile; and what is under way when a program stops to do other things
still comes. The first version counted all of this as waiting. Both versions, in µs:

| kernels | flux-1024px, first version | this one | hunyuan-video-480x640x65, first version | this one |
|---|--:|--:|--:|--:|
| before: newton predict, rank 0 | 36.4 | 35.3 | 147.9 | 146.9 |
| before: newton predict, rank 32 | 1081.8 | 1083.8 | 5260.5 | 5270.2 |
| before: predict velocity, rank 0 | 150.7 | 152.1 | 671.5 | 673.3 |
| before: predict velocity, rank 32 | 1301.7 | 1303.8 | 6446.9 | 6450.9 |
| before: dense predict, K = 6 | 650.5 | 649.2 | 3248.5 | 3239.3 |
| before: ring push | 14.2 | 15.7 | 64.7 | 66.1 |
| now: forecast, rank 0 | 32.1 | 30.0 | 143.8 | 141.7 |
| now: forecast, rank 32 | 57.4 | 56.1 | 275.0 | 275.4 |
| now: skipped step, rank 0 | 31.5 | 28.9 | 136.3 | 122.3 |
| now: skipped step, rank 32 | 52.8 | 50.4 | 226.1 | 224.7 |

The kernels in the rows "now" are those of the day of the change, not those of the table above.
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
5. What is under way when a program stops to do other things still comes. Programs that follow others find in the
   second-level cache what all programs read.
6. Scratch memory beyond the second-level cache is written to memory and read from it once.

The model does not know: misses of the instruction cache, conflicts of the banks of shared memory, clocks that fall
under load, the translation of addresses, and which half of the cache holds what. It takes all data as cold. We expect
it to be wrong by up to 30 %; a comparison of two kernels is more reliable than a time.
"""


BELOW_PREDICTED = """
Features are bfloat16. Newton reads four anchors. A forecast and a skipped step are one launch each, with weights that
one launch makes at the beginning of a run. "Before" are the kernels of 28 November 2026 by the same model: each made
its weights itself, and its programs met at every tile. The KAN layer has G = 8 and p = 3. Its floor counts the p + 1
bases that are not zero. An implementation that multiplies all bases does 2.4 times as much."""


def misses(figures: dict) -> str:
    """Which targets are missed, and what the model says of the reason."""
    size = str(FLUX)
    missed = [
        f"{name} at {shape} ({found['ratio']:.2f} instead of {target_of(name, shape)})"
        for name, shapes in figures.items()
        for shape, found in shapes.items()
        if "ratio" in found and found["ratio"] > (target_of(name, shape) or found["ratio"])
    ]
    if not missed:
        return "## Targets\n\nBy the model, all targets are met."
    forecast, step = (figures[f"{name}, rank 32"][size] for name in ("forecast", "skipped step"))
    finish, launch = forecast["launches"][0]["finish_us"], step["launches"][0]
    reasons = {
        "forecast, rank 32": f"""The features are read in about {forecast["predicted_us"] - finish:.0f} of
            {forecast["predicted_us"]:.0f} µs at {size}, which is near the memory's limit. Then the last of the programs
            that meet adds the residual to the forecast of its tokens, for all channels, while the others have ended.
            That takes {finish:.0f} µs: its few warps wait for the cache and for each other in each round.""",
        "skipped step, rank 32": f"""There are {launch["instructions_per_byte"]:.1f} instructions for each byte. The
            three taps and the forecast are written to shared memory for the tensor cores, one after the other, and each
            time the warps wait for each other. {launch["registers"]} registers for a thread leave
            room for {launch["resident"]} programs on a multiprocessor, which do not hide these waits.""",
        "skipped step, rank 0": """The pipeline of copies is empty when a program goes from one tile of tokens to the
            next.""",
    }
    listed = [f"- **{name}.** {reason}" for name, reason in reasons.items() if any(name in each for each in missed)]
    return "\n\n".join(["## Targets that are missed", "; ".join(missed) + ".", "\n".join(listed)])


TRIED = """## What was tried for rank 32

These are predicted times, in µs, of other designs, none of which is in use. They were computed by hand with the model's
constants of 29 November 2026, and do not change with the tables of this page. The results of these variants of the
stream forecast and of the stream velocity were not tested.

| design | forecast, rank 32 | skipped step, rank 32 | why it was not kept |
|---|---|---|---|
| the weights of the taps folded into the maps, products of differences to the newest anchor | flux-1024px 52.6, \
hunyuan-video-480x640x65 221 | 40.9, 219 | the folded maps must be made for each step, which is another launch, or \
memory for all steps of a run |
| the same, products of the stored anchors, each map as a sum of two in bfloat16 | | flux-1024px 42.0; 42.2 with the \
second part for the newest anchor only | more bytes of maps: the cache alone needs 34 µs, or 30 µs with \
the second part for the newest anchor only |
| the same with 128 tokens and 8 warps | | flux-1024px 48.8 to 76.8 | one program on a multiprocessor |
| a program has all channels of its tokens, so no two programs share a token | flux-1024px 60 to 100, \
hunyuan-video-480x640x65 272 to 284 | | with few tokens in a tile, each program reads all maps |
| a second launch adds the residual | flux-1024px 47.8 (31.9 + 15.9) | | it reads and writes the forecast once more; a \
step is one launch |

At flux-1024px the second-level cache needs 27.8 µs for the bytes of the skipped step, with the tiles in use. The model
counts 128 rows of the head's map, of which 96 exist; without the others it would be about 26 µs. With 6.5 µs for the
start and the end of a program, that is 32 to 34 µs, 1.5 times the floor. The target is 1.6, so little may be lost
elsewhere. At hunyuan-video-480x640x65 the cache needs 154 µs, 1.45 times the floor, or about 1.36 without those rows,
so tiles of 64 tokens can't meet the target of 1.15.

A forecast must read all channels of a token before it knows the residual of any of them. The last part of
the program reads 16 KB of the forecast and 8 KB of the map, and writes 16 KB of the forecast, for each 64 tokens and
128 channels. That takes 8.4 µs for all channels, at the 64 bytes per clock of one multiprocessor. The forecast of rank
0 takes 30 µs at flux-1024px. So a launch in which the last of the programs that meet does the end alone can't be faster
than 38 µs, 1.4 times the floor."""

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
of it. "Over a copy's time" is the ratio to the time of a copy of as many bytes. The benchmarks print the same ratio for
times that they measure.

![Predictions]({chart})

## Predicted times

"""
    parts = [
        text + "\n".join(predicted_table(figures, BEFORE if preset == "H200" else None)),
        BELOW_PREDICTED,
        *([misses(figures), TRIED] if preset == "H200" else []),
        DECIDES,
        "\n".join(details_table(figures)),
    ]
    meetings = meetings_table(figures)
    if len(meetings) > 2:
        parts += ["## Programs that meet\n", "\n".join(meetings)]
    if preset == "H200":
        parts += [review(BEFORE), VERSIONS]
    parts += [HOW, "## Constants", "\n".join(constants_table(device)), SOURCES, FLOORS_TEXT]
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

An earlier review by hand read the kernels of 28 November 2026. These are its times and those of this model at {size},
in µs. All programs walk the tiles in one order, so the program that finishes one tile is late for the next one, and
finishes that too: a convoy.

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
    most = max(found.get("ratio", 1) for shapes in figures.values() for found in shapes.values())
    for name, shapes in figures.items():
        ticks.append(place + (len(shapes) - 1) / 2)
        names.append(name)
        for shape, found in shapes.items():
            if "ratio" in found:
                old = BEFORE.get(TAKES_PLACE_OF.get(name, name), {}).get(shape)
                if old is not None and device is PRESETS["H200"]:
                    axes.barh(place, old["ratio"], color="0.85")
                    most = max(most, old["ratio"])
                axes.barh(place, found["ratio"], color=f"C{sizes.index(shape)}")
                if device is PRESETS["H200"] and (target := target_of(name, shape)):
                    axes.plot([target, target], [place - 0.4, place + 0.4], color="k", linewidth=1)
                axes.text(
                    1.03 * max(found["ratio"], old["ratio"] if old else 0),
                    place,
                    f"{found['predicted_us']:.0f} µs",
                    va="center",
                    fontsize=7,
                )
            place += 1
        place += 0.7
    axes.axvline(1, color="0.3")
    axes.set(xscale="log", yticks=ticks, xlabel="predicted time over the floor", xlim=(0.9, 1.6 * most))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color="0.85", label="before")]
    handles += [plt.Rectangle((0, 0), 1, 1, color=f"C{number}", label=size) for number, size in enumerate(sizes)]
    axes.legend(handles=handles, fontsize=8)
    axes.set_title(f"{device.name}: predictions of a model, not measurements")
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)
