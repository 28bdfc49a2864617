"""The launches of the public calls, compiled without a GPU as the calls would launch them, and described for the model.

It makes the calls of `tests/support/ahead_of_time.py`, and compiles the ring's CUDA code with `nvcc`.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, prod
from pathlib import Path

from shapes import FLUX, HUNYUAN_VIDEO, QWEN_IMAGE, FeatureShape, LayerShape

from lesa_kernels import work

from . import machine_code
from .devices import Device
from .multiprocessor import DoesNotFit
from .prediction import Launch, Prediction, predict

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "support"))
import ahead_of_time  # noqa: E402

READS = (80, 86, 89, 90)  # architectures of which the instructions are known
NO_COMPILER = "there is no nvcc to compile it with"
DENSE_HISTORY = 6  # entries of the middle one of the dense variant's three stages
RUN_STEPS = 41  # predicted steps of a run of 50
OUTS = 64  # of the head of FLUX, Qwen-Image and HunyuanVideo: 16 channels, patches of 2 x 2


@dataclass(frozen=True)
class Recorded:
    """A launch as it was recorded: the compiled kernel, how many programs, and the arguments by name."""

    kernel: object
    programs: int
    arguments: dict


def recorder(device: Device) -> Callable[[Callable], list[Recorded]]:
    """What calls a function and returns its launches. From now on launches compile for `device` and do nothing else."""
    from triton.runtime.jit import JITFunction

    ahead_of_time.ARCHITECTURES[device.architecture] = device.multiprocessors
    ahead_of_time.pretend(device.architecture)
    compile_only, launches = JITFunction.run, []

    def record(self, *args, grid, **kwargs):
        kernel = compile_only(self, *args, grid=grid, **kwargs)
        arguments = dict(zip(self.arg_names, args)) | kwargs
        sizes = grid(arguments) if callable(grid) else grid
        launches.append(Recorded(kernel, prod(sizes), arguments))
        return kernel

    JITFunction.run = record

    def recorded(call: Callable) -> list[Recorded]:
        launches.clear()
        call()
        return list(launches)

    return recorded


def code_of(found: Recorded) -> machine_code.MachineCode:
    """The machine code of a recorded launch."""
    return _code_of(found.kernel)


@cache  # several shapes launch the same kernel
def _code_of(kernel) -> machine_code.MachineCode:
    metadata = kernel.metadata
    return machine_code.read(kernel.asm["cubin"], metadata.num_warps, metadata.shared)


@dataclass(frozen=True)
class Operation:
    """Something of which the time is predicted.

    Args:
        name: in the tables.
        shapes: at which it is predicted.
        call: of a shape.
        amounts: of a shape: bytes and FLOPs of `lesa_kernels.work`.
        describe: of a recorded launch, the shape and its amounts.
    """

    name: str
    shapes: tuple[FeatureShape | LayerShape, ...]
    call: Callable[[FeatureShape | LayerShape], object]
    amounts: Callable[[FeatureShape | LayerShape], dict[str, int]]
    describe: Callable[..., Launch]

    def launches(self, shape: FeatureShape | LayerShape, recorded, device: Device) -> list[Launch]:
        """What the call launches.

        Raises:
            DoesNotFit: the model can't read the device's code, or there is nothing to compile it with.
        """
        if device.architecture not in READS:
            raise DoesNotFit(f"the model does not read the machine code of sm_{device.architecture}")
        amounts = self.amounts(shape)
        if self.describe is ring_push:
            return [ring_push(shape, device, amounts)]
        return [self.describe(each, shape, amounts) for each in recorded(lambda: self.call(shape))]


def _case(name: str) -> Callable[[FeatureShape | LayerShape], object]:
    """The call of a case of `ahead_of_time`."""
    (case,) = [each for each in ahead_of_time.CASES if each.name == name]
    return case.call


def plan_of_run(shape: FeatureShape) -> object:
    """The weights of all predicted steps of a run."""
    predictor = ahead_of_time.empty_predictor(shape, "newton", rank=32)
    levels = [[1.0, 0.9, 0.8, 0.7]] * RUN_STEPS
    return predictor.plan(levels, [0.5] * RUN_STEPS, shape.batch)


def _loads(each: machine_code.Instruction) -> bool:
    """Whether an instruction reads features or writes a result."""
    return each.name in ("LDG", "LDGSTS", "STG") and "STRONG" not in each.forms


def tiles_of_channels(found: Recorded, shape: FeatureShape, amounts: dict[str, int]) -> Launch:
    """Newton's forecast outside a run: a program owns a block of channels, and loops over tiles of tokens."""
    values = found.arguments
    written = shape.batch * shape.tokens * shape.dim * 2
    return Launch(
        code=code_of(found),
        programs=found.programs,
        main_loop=0,
        rounds=ceil(ceil(shape.tokens / values["BLOCK_T"]) / values["splits"]),
        read=amounts["bytes"] - written,
        written=written,
        trips={},
        streams=lambda each: each.name in ("LDGSTS", "STG"),
        first_bytes=(values["K"] - 1) * values["BLOCK_D"] * values["M"] * 4,
        leaves_out=_of_first_tile,
        once=True,
    )


def _of_first_tile(begin: int, part: list[machine_code.Instruction], times: int) -> bool:
    """Whether a part of newton's forecast is left out: the weights of the anchors are made at the first tile only."""
    return times > 0 and sum(each.name == "SHFL" for each in part) > 32


def coefficients(found: Recorded, shape: FeatureShape, amounts: dict[str, int]) -> Launch:
    """The weights of a run: each program makes those of a block of channels of one step."""
    values = found.arguments
    return Launch(
        code=code_of(found),
        programs=found.programs,
        main_loop=None,
        rounds=1,
        read=amounts["bytes"] - _weight_bytes(shape),
        written=_weight_bytes(shape),
        trips={},
        streams=_loads,
        first_bytes=(values["K"] - 1) * values["BLOCK_D"] * values["M"] * 4,
    )


def _weight_bytes(shape: FeatureShape) -> int:
    """Of the weights of all steps of a run: four anchors and a constant for each channel."""
    return RUN_STEPS * 5 * shape.dim * 4


def stream(found: Recorded, shape: FeatureShape, amounts: dict[str, int]) -> Launch:
    """The stream kernels: a weighted sum, or sums for a residual and an output head over splits of the channels."""
    values, code = found.arguments, code_of(found)
    rank, outs = values.get("RANK", 0), values.get("OUTS", 0)
    blocks = ceil(shape.dim / values["BLOCK_D"])
    elements = shape.batch * shape.tokens * shape.dim
    read = values["K"] * (elements * shape.dtype.itemsize + shape.dim * 4)
    read += (outs * 2 + rank * 2 * values["K"]) * shape.dim  # weights of the head and the residual, in bfloat16
    written = shape.batch * shape.tokens * (outs or shape.dim) * 2
    main = _loop_over_channels(code)
    launch = Launch(code, found.programs, main, 0, read, written, {}, _loads)
    if "SPLITS" not in values:
        return replace(launch, rounds=ceil(ceil(shape.tokens / values["groups"]) / values["BLOCK_T"]))
    splits, rounds, together = (values[name] for name in ("SPLITS", "rounds", "together"))
    trips = {}
    outer = [number for number, loop in enumerate(code.loops) if code.loops[main] in loop]
    trips |= dict(zip(outer, (rounds, together)))
    tile_bytes = values["BLOCK_T"] * shape.dim * 2
    in_finish = [number for number, loop in enumerate(code.loops) if number > main]
    for number in in_finish:
        loop = code.loops[number]
        if not any(other in loop for other in code.loops):  # over the channels, or over the parts of the splits
            trips[number] = max(round(tile_bytes / _stored_bytes(code, loop)), 1) if _copies(code, loop) else 1
        elif number == in_finish[0]:
            trips[number] = together
    return replace(
        launch,
        rounds=ceil(blocks / splits),
        trips=trips,
        scratch=values["parts"].numel() * 4,
        members=splits,
        meetings=rounds,
        leaves_out=_of_first_block,
    )


def _of_first_block(begin: int, part: list[machine_code.Instruction], times: int) -> bool:
    """Whether a part of the stream kernel is left out: the shift of a tile's tokens is made at its first channels."""
    names = {each.name for each in part}
    return times > 0 and "LDG" in names and not names & {"LDGSTS", "STG", "BAR"}


def _loop_over_channels(code: machine_code.MachineCode) -> int:
    """The number of the innermost loop that copies most, before programs meet."""
    before = code.finish[0] if code.finish else len(code.instructions)
    innermost = [
        number
        for number, loop in enumerate(code.loops)
        if loop.start < before and not any(other in loop for other in code.loops)
    ]
    return max(innermost, key=lambda number: _copies(code, code.loops[number]))


def _stored_bytes(code: machine_code.MachineCode, loop: machine_code.Loop) -> int:
    """What a program stores in one round of a loop."""
    body = code.instructions[loop.start : loop.end + 1]
    return sum(32 * each.lane_bytes * code.warps for each in body if each.name == "STG")


def _copies(code: machine_code.MachineCode, loop: machine_code.Loop) -> float:
    """The share of a loop's instructions that copy to shared memory."""
    body = code.instructions[loop.start : loop.end + 1]
    return sum(each.name == "LDGSTS" for each in body) / len(body)


def dense(found: Recorded, shape: FeatureShape, amounts: dict[str, int]) -> Launch:
    """The dense variant: a matrix product that reads the ring through tensor descriptors."""
    values, code = found.arguments, code_of(found)
    written = shape.batch * shape.tokens * shape.dim * 2
    return Launch(
        code=code,
        programs=found.programs,
        main_loop=0,
        rounds=DENSE_HISTORY * ceil(shape.dim / values["BLOCK_K"]),
        read=amounts["bytes"] - written,
        written=written,
        trips={},
        streams=lambda each: False,
        copy_bytes=(values["BLOCK_R"] + values["BLOCK_C"]) * values["BLOCK_K"] * 2 // 2,  # two copies a step
    )


def kan(found: Recorded, shape: LayerShape, amounts: dict[str, int]) -> Launch:
    """The KAN layer: rounds over blocks of inputs and parts of the bases."""
    values, code = found.arguments, code_of(found)
    written = shape.rows * shape.out_features * 2
    return Launch(
        code=code,
        programs=found.programs,
        main_loop=0,
        rounds=ceil(shape.in_features / values["BLOCK_I"]) * values["PARTS"],
        read=amounts["bytes"] - written,
        written=written,
        trips={},
        streams=lambda each: each.name == "LDG",
    )


@cache
def ring_push_code(architecture: int) -> machine_code.MachineCode:
    """The compiled kernel that pushes bfloat16 into a ring of bfloat16."""
    if shutil.which("nvcc") is None:
        raise DoesNotFit(NO_COMPILER)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ring.cubin"
        source = ROOT / "csrc" / "ring_buffer_cuda.cu"
        options = ["-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++17", "-o", file]
        subprocess.run(["nvcc", *options, source], check=True, capture_output=True)
        return machine_code.read(file.read_bytes(), warps=8, function="ring_push_kernelINS_8BFloat16ES2_")


def ring_push(shape: FeatureShape, device: Device, amounts: dict[str, int]) -> Launch:
    """A push that keeps the dtype, as `csrc/ring_buffer_cuda.cu` divides it."""
    code = ring_push_code(device.architecture)
    vectors = shape.batch * shape.tokens * shape.dim * 2 // 16
    rounds = ceil(vectors / (256 * 4))
    programs = min(rounds, 32 * device.multiprocessors)
    written = amounts["bytes"] // 2
    return Launch(
        code=code,
        programs=programs,
        main_loop=None,
        rounds=1,
        read=amounts["bytes"] - written,
        written=written,
        trips={1: ceil(rounds / programs)},
        streams=lambda each: each.lane_bytes == 16,
        leaves_out=partial(_of_ragged_runs, code),
    )


def _of_ragged_runs(
    code: machine_code.MachineCode, begin: int, part: list[machine_code.Instruction], times: int
) -> bool:
    """Whether a part of `ring_push_kernel` is not executed where runs are adjacent and begin at 16 bytes."""
    moves = [each for each in part if each.name in ("LDG", "STG")]
    if any(each.lane_bytes == 16 for each in moves):
        return False
    first = min(i for i, each in enumerate(code.instructions) if each.name == "LDG" and each.lane_bytes == 16)
    waits_for_state = begin < first and any(each.name == "BAR" for each in part)
    return waits_for_state or any(each.lane_bytes == 2 for each in moves) or any(each.name == "CALL" for each in part)


FEATURES = (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO)
LAYER = replace(ahead_of_time.WIDE, name="65536 rows, 256 to 256")


def _forecast(rank: int) -> Operation:
    def amounts(shape):
        return work.newton_predict(*shape.sizes, rank=rank)

    return Operation(f"forecast, rank {rank}", FEATURES, ahead_of_time.stream(rank), amounts, stream)


def _skipped_step(rank: int) -> Operation:
    def amounts(shape):
        return work.predict_velocity(*shape.sizes, OUTS, rank=rank)

    return Operation(f"skipped step, rank {rank}", FEATURES, ahead_of_time.stream(rank, OUTS), amounts, stream)


def _plan(shape: FeatureShape) -> dict[str, int]:
    """The parameters of a stage in, the weights out."""
    parameters = 3 * shape.dim * 65 * 4
    return {"bytes": parameters + _weight_bytes(shape), "flops": 2 * RUN_STEPS * 3 * 64 * shape.dim}


def _layer(shape: LayerShape) -> dict[str, int]:
    return work.bspline_kan(shape.rows, shape.in_features, shape.out_features, shape.dtype, grid_size=8)


OPERATIONS = [
    _forecast(0),
    _forecast(32),
    _skipped_step(0),
    _skipped_step(32),
    Operation(f"weights of a run, {RUN_STEPS} steps", (FLUX,), plan_of_run, _plan, coefficients),
    Operation(
        "forecast outside a run, rank 0",
        FEATURES,
        _case("newton_predict-rank0"),
        lambda shape: work.newton_predict(*shape.sizes),
        tiles_of_channels,
    ),
    Operation(
        f"dense predict, K = {DENSE_HISTORY}",
        FEATURES,
        _case("dense_predict"),
        lambda shape: work.dense_predict(*shape.sizes, DENSE_HISTORY),
        dense,
    ),
    Operation("KAN layer, forward", (LAYER,), _case("bspline_kan"), _layer, kan),
    Operation("ring push", FEATURES, lambda shape: None, lambda shape: work.ring_push(*shape.sizes), ring_push),
]


def figures(device: Device) -> dict[str, dict[str, dict]]:
    """Operation -> shape -> what the model says. This compiles all of them, so it needs a process of its own."""
    recorded = recorder(device)
    return {
        operation.name: {str(shape): _figures(operation, shape, recorded, device) for shape in operation.shapes}
        for operation in OPERATIONS
    }


def _figures(operation: Operation, shape, recorded, device: Device) -> dict:
    amounts = operation.amounts(shape)
    floor = device.floor(amounts["bytes"], amounts["flops"])
    copy = max(amounts["bytes"] / device.reached_bandwidth(1 / 2), amounts["flops"] / device.flops)
    found = {"floor_us": _us(floor), "copy_floor_us": _us(copy)}
    try:
        launches = operation.launches(shape, recorded, device)
        predictions = [predict(device, launch) for launch in launches]
    except DoesNotFit as refusal:
        return found | {"refused": str(refusal)}
    total = sum(each.seconds for each in predictions)
    found |= {"predicted_us": _us(total), "ratio": round(total / floor, 3), "ratio_to_copy": round(total / copy, 3)}
    return found | {"launches": [_details(*each) for each in zip(launches, predictions)]}


def _details(launch: Launch, prediction: Prediction) -> dict:
    """One launch, as the page shows it."""
    found = {
        "predicted_us": _us(prediction.seconds),
        "registers": launch.code.registers,
        "shared_kb": round(launch.code.shared / 1024, 1),
        "warps": launch.code.warps,
        "programs": prediction.programs,
        "resident": prediction.resident,
        "waves": prediction.waves,
        "idle": prediction.idle,
        "in_flight_kb": round(prediction.in_flight / 1024, 1),
        "instructions_per_byte": round(prediction.instructions_per_byte, 2),
        "first_data_us": _us(prediction.first_data),
        "issue_us": _us(prediction.issue),
        "memory_us": _us(prediction.memory),
        "cache_us": _us(prediction.cache),
        "round_us": _us(prediction.per_round),
        "scratch_mb": round(launch.scratch / 1e6, 1),
    }
    if prediction.rotated is not None:
        found |= {
            "finish_us": _us(prediction.finish),
            "most_finished": prediction.most_finished,
            "fair": round(prediction.fair, 1),
            "rotated_us": _us(prediction.rotated),
        }
    return found


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)
