"""Compares random pushes into feature rings, and reads from them, with the plain torch form, byte by byte.

As a program, `python ring_fuzz.py --cases 1000` runs the compiled extension of the lesa_kernels that Python finds, and
with `--kernels` its CUDA kernels, where they were built to run on the CPU (see `cuda_on_cpu/`). `--ties` and `--large`
add what chance seldom finds, see `run_ties` and `run_large`.
"""

import argparse
import ctypes
import itertools
import random
import sys
import time
import traceback

import torch

from lesa_kernels import FeatureRing
from lesa_kernels.extension import extension
from lesa_kernels.feature_ring import op

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (*FEATURE_DTYPES, torch.float8_e4m3fn)
SLACK = 31  # elements that a buffer may begin after the beginning of its memory
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Raises unless the bytes are equal; only the payload of a NaN may differ."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    actual, expected = actual.cpu(), expected.cpu()
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN at other places"
        known = ~expected.isnan()
        actual, expected = (t.contiguous().view(INTEGERS[t.itemsize])[known] for t in (actual, expected))
    assert torch.equal(actual, expected), f"{name}: {int((actual != expected).sum())} elements differ"


def ragged(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that begins anywhere, at elements' alignment, and ends where its memory ends."""
    offset = rng.choice((0, 0, rng.randrange(SLACK)))
    memory = torch.empty(offset + tensor.numel(), dtype=tensor.dtype)
    copy = memory[offset:].view(tensor.shape)
    copy.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    return copy


def random_values(rng: random.Random, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Values of all magnitudes; some tokens are zero, tiny, huge or hold what is not finite."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    values = torch.randn(shape, generator=generator)
    kinds = torch.randint(12, shape[:2], generator=generator)
    for kind, factor in ((0, 0.0), (1, -0.0), (2, 1e-41), (3, 1e-7), (4, 1e30), (5, 448.0), (9, 4e4)):
        values[kinds == kind] *= factor
    values[kinds == 10] *= 2.0 ** torch.randint(-149, 128, shape, generator=generator)[kinds == 10]
    for kind, value in ((6, float("nan")), (7, float("inf")), (8, -float("inf"))):
        values[..., rng.randrange(shape[2])][kinds == kind] = value
    return values.to(dtype)


def random_layout(rng: random.Random, values: torch.Tensor) -> torch.Tensor:
    """The same values with other strides."""
    n, tokens, dim = values.shape
    kind = rng.randrange(6)
    if kind == 0:
        return ragged(rng, values)
    if kind == 1:  # a slice of the tokens
        memory = torch.empty(n, tokens + 3, dim, dtype=values.dtype)
        view = memory[:, 2 : 2 + tokens]
    elif kind == 2:  # a slice of the width
        memory = torch.empty(n, tokens, dim + 5, dtype=values.dtype)
        begin = rng.randrange(6)
        view = memory[..., begin : begin + dim]
    elif kind == 3:  # every other element
        memory = torch.empty(n, 2 * tokens, 2 * dim, dtype=values.dtype)
        view = memory[:, 1::2, 1::2]
    elif kind == 4:  # other orders
        view = torch.empty(dim, tokens, n, dtype=values.dtype).permute(2, 1, 0)
    else:  # one value, or one token, for all
        values = (
            values[:, :1].expand(n, tokens, dim) if tokens and rng.random() < 0.5 else values[..., :1].expand_as(values)
        )
        return values
    return view.copy_(values)


def random_sigma(rng: random.Random, ring: FeatureRing, rows: list[int]) -> float | torch.Tensor:
    """Below, at and above the newest levels, a zero, or what is not finite."""
    if rng.random() < 0.3:
        return rng.choice((rng.random(), 0.0))
    levels = []
    for row in rows:
        newest = float(ring.sigmas[(int(ring.cursor[row]) - 1) % ring.capacity, row])
        usual = (newest * 0.9, newest * 0.9, newest - 0.125, newest, newest + 0.5)
        levels.append(rng.choice((*usual, *usual, -0.0, float("nan"), float("inf"))))
    return torch.tensor(levels).repeat_interleave(2)[::2] if rng.random() < 0.2 else torch.tensor(levels)


def random_rows(rng: random.Random, batch: int) -> list[int] | torch.Tensor | None:
    if rng.random() < 0.5:
        return None
    rows = rng.sample(range(batch), rng.randint(0, batch))
    return torch.tensor(rows, dtype=torch.int64).repeat_interleave(2)[::2] if rng.random() < 0.2 else rows


class Case:
    """A ring that is worked with twice: with what is tested, and in plain torch."""

    def __init__(self, rng: random.Random, backend: str = "extension"):
        self.rng = rng
        dim = rng.choice((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 48, 64, 65, 128, 200, 513, rng.randint(1, 300)))
        if rng.random() < 0.02:
            dim = rng.choice((512, 1000, 3072, 3073, 4100, 9000, 17000))  # the last ones are too wide for some kernels
        tokens = rng.choice((0, 1, 1, 2, 3, 5, 8, 9, rng.randint(1, 40))) if dim < 1000 else rng.randint(1, 3)
        batch = rng.randint(1, 4)
        if rng.random() < 0.02:
            batch, tokens, dim = rng.randint(33, 70), rng.randint(1, 13), rng.randint(1, 20)  # a block for each sample
        elif rng.random() < 0.02:
            tokens, dim = rng.randint(40, 80), rng.choice((200, 256, 301))  # and many for each
        sizes = (rng.choice((1, 1, 2, 3, 5)), batch, tokens, dim)
        dtype = rng.choice(STORAGE_DTYPES)
        self.tested, self.plain = (FeatureRing(*sizes, dtype=dtype, backend=name) for name in (backend, "torch"))
        for ring in (self.tested, self.plain):  # what nobody has written yet has to stay as it is
            ring.storage.view(torch.uint8).fill_(0xFF if dtype != torch.float8_e4m3fn else 0x7F)
            ring.sigmas.fill_(
                rng.choice((0.5, float("nan"))) if ring is self.tested else self.tested.sigmas[0, 0].item()
            )
        for name, buffer in self.tested._buffers().items():
            setattr(self.tested, name, ragged(rng, buffer))
        self.snapshots = None

    def __repr__(self) -> str:
        return repr(self.plain)

    def step(self) -> str:
        """Does one thing to both rings and compares them; returns what it was."""
        name = self.rng.choice(
            ("push", "push", "push", "push", "gather", "newest_first", "reset", "snapshot", "refuse")
        )
        getattr(self, name)()
        for kind, expected in self.plain._buffers().items():
            assert_same_bytes(getattr(self.tested, kind), expected, kind)
        return name

    def push(self) -> None:
        rows = random_rows(self.rng, self.plain.batch)
        listed = list(range(self.plain.batch)) if rows is None else list(map(int, rows))
        shape = (len(listed), self.plain.tokens, self.plain.dim)
        features = random_layout(self.rng, random_values(self.rng, shape, self.rng.choice(FEATURE_DTYPES)))
        sigma = random_sigma(self.rng, self.plain, listed)
        for ring in (self.tested, self.plain):
            ring.push(features, sigma, rows)

    def gather(self) -> None:
        age = self.rng.randrange(self.plain.capacity)
        assert_same_bytes(self.tested.gather(age), self.plain.gather(age), f"gather({age})")

    def newest_first(self) -> None:
        for actual, expected in zip(self.tested.newest_first(), self.plain.newest_first()):
            assert_same_bytes(actual, expected, "newest_first")
        for age in range(self.plain.capacity):
            assert_same_bytes(self.tested.gather(age), self.plain.newest_first()[0][age], f"gather({age})")

    def reset(self) -> None:
        rows = random_rows(self.rng, self.plain.batch)
        for ring in (self.tested, self.plain):
            ring.reset(rows)

    def snapshot(self) -> None:
        if self.snapshots is None:
            self.snapshots = self.tested.snapshot(), self.plain.snapshot()
        else:
            for ring, snapshot in zip((self.tested, self.plain), self.snapshots):
                ring.restore(snapshot)
            self.snapshots = None

    def refuse(self) -> None:
        """A call that can't be right is refused and changes nothing; the comparison after it shows that."""
        self.rng.choice((self.bad_push, self.bad_push, self.bad_gather, self.bad_values))()

    def bad_push(self) -> None:
        ring, rng = self.tested, self.rng
        features, sigma = torch.ones(ring.batch, ring.tokens, ring.dim), torch.ones(ring.batch)
        arguments = list(op.push_arguments(*self.state(), features, sigma, None))
        strides = list(features.stride())
        strides[rng.randrange(3)] = -rng.randint(1, 2**40)
        bad = {1: ["int8", ""], 2: [self.bad_sizes(rng.randint(50, 62))], 4: [0], 5: [0], 6: [0]}
        bad |= {8: ["float64", "float8_e4m3fn"], 9: [strides], 10: [arguments[10] + 2], 12: [4]}
        bad |= {13: [-rng.randint(1, 2**40), ring.batch + 1], 14: [-2], 16: [0, -1]}
        if features.numel() > 0:
            in_ring = ring.storage.data_ptr() + ring.storage.nbytes - 1
            bad |= {0: [0, arguments[0] + 1] if ring.storage.itemsize > 1 else [0]}
            bad |= {3: [4096] if ring.scales is None else [0, arguments[3] + 2]}
            bad |= {7: [0, arguments[7] + 1, in_ring - in_ring % features.itemsize]}
        place = rng.choice(sorted(bad))
        arguments[place] = rng.choice(bad[place])
        assert_refused(extension().ring_push, arguments)

    def bad_gather(self) -> None:
        ring, rng = self.tested, self.rng
        output = torch.empty(ring.storage.shape[1:], dtype=ring.dtype if ring.scales is None else torch.float32)
        arguments = list(op.gather_arguments(ring.storage, ring.scales, ring.cursor, ring.count, 0, output))
        bad = {1: ["int8", ""], 2: [self.bad_sizes(62)], 4: [0], 5: [0], 6: [-1, ring.capacity], 8: [-2], 10: [0, -1]}
        if output.numel() > 0:
            bad |= {0: [0], 3: [4096] if ring.scales is None else [0, arguments[3] + 2], 7: [0, arguments[7] + 1]}
        place = rng.choice(sorted(bad))
        arguments[place] = rng.choice(bad[place])
        assert_refused(extension().ring_gather, arguments)

    def bad_values(self) -> None:
        """What has to be read to be seen: the CPU reads all of it before it writes. A GPU fails an assertion."""
        ring, rng = self.tested, self.rng
        if op._where(ring.storage)[0] >= 0:
            return
        features = torch.ones(ring.batch, ring.tokens, ring.dim)
        if rng.random() < 0.5:
            listed = rng.sample(range(ring.batch), ring.batch - 1)
            rows = torch.tensor([*listed, rng.choice((ring.batch, -1, 2**40, *listed[:1]))])
            assert_refused(extension().ring_push, op.push_arguments(*self.state(), features, 0.5, rows))
            return
        buffer, row = rng.choice((ring.cursor, ring.count)), rng.randrange(ring.batch)
        value = buffer[row].item()
        buffer[row] = rng.choice((-1, ring.capacity + (buffer is ring.count)))
        assert_refused(extension().ring_push, op.push_arguments(*self.state(), features, 0.5, None))
        output = torch.empty(ring.storage.shape[1:])
        state = (ring.storage, ring.scales, ring.cursor, ring.count)
        assert_refused(extension().ring_gather, op.gather_arguments(*state, 0, output))
        buffer[row] = value

    def state(self) -> tuple:
        ring = self.tested
        return ring.storage, ring.scales, ring.sigmas, ring.cursor, ring.count

    def bad_sizes(self, exponent: int) -> list[int]:
        """The storage's, but for one that is negative, or 2 to the `exponent`."""
        sizes, negative = list(self.tested.storage.shape), -self.rng.randint(1, 2**40)
        huge = negative if 0 in sizes else 2**exponent
        sizes[self.rng.randrange(4)] = self.rng.choice((negative, huge))
        return sizes


def assert_refused(function, arguments) -> None:
    try:
        function(*arguments)
    except ValueError as error:
        assert "must" in str(error), error
    else:
        raise AssertionError(f"{function.__name__} took {arguments!r}")


def run(seed: int, cases: int, backend: str = "extension", steps: int = 8, seconds: float = float("inf")) -> int:
    """Works through random cases and returns how many there were; a failure names the seed that repeats it alone."""
    end = time.monotonic() + seconds
    for done in range(cases):
        if time.monotonic() > end:
            return done
        case = None
        try:
            case = Case(random.Random(seed + done), backend)
            history = [case.step() for _ in range(steps)]
        except Exception as error:
            raise AssertionError(f"ring_fuzz.run({seed + done}, 1): {case}: {error}") from error
        assert len(history) == steps
    return cases


def both_rings(*sizes, dtype: torch.dtype, backend: str) -> tuple[FeatureRing, FeatureRing]:
    return tuple(FeatureRing(*sizes, dtype=dtype, backend=name) for name in (backend, "torch"))


def push_both(rings: tuple[FeatureRing, FeatureRing], features: torch.Tensor, *arguments) -> None:
    for ring in rings:
        ring.push(features, *arguments)
    for name, expected in rings[1]._buffers().items():
        assert_same_bytes(rings[0]._buffers()[name], expected, f"{name} of {rings[0]} after {features.dtype}")


def tie_tokens(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Tokens of many scales with values whose quotients lie at all ties between two e4m3 numbers, and beside them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers])
    # A kernel divides in another way below a scale of 2^-80 and above one of 2^80; below 2^-126 are subnormal numbers.
    exponents = torch.tensor([-148, -145, -140, -134, -130, -127, -126, -120, -85, *[-80] * 8, *[80] * 8, 90, 118])
    exponents = torch.cat([exponents.float(), torch.randint(-79, 80, (24,), generator=generator).float()])
    exponents = torch.cat([exponents, torch.randint(-12, 8, (24,), generator=generator).float()])
    mantissas = 1 + torch.rand(len(exponents), generator=generator)
    mantissas[9:25] = torch.tensor([1 - 2**-24, 1, 1 + 2**-23, 1 + 2**-22, 1.25, 1.75, 2 - 2**-22, 2 - 2**-23] * 2)
    mantissas[::3] = mantissas[::3].bfloat16().float()
    largest = (448.0 * mantissas.double() * 2.0 ** exponents.double()).to(dtype)
    largest = largest[largest.isfinite() & (largest > 0)][:, None]
    scale = (largest.float() / 448).double()
    nearest = (scale * ties).to(dtype)
    integers = nearest.view(INTEGERS[dtype.itemsize])
    values = [(integers + delta).view(dtype) for delta in (-2, -1, 0, 1, 2)]
    values = torch.cat(values, dim=1).nan_to_num(0.0).abs().minimum(largest)
    return torch.cat([values, -values, largest], dim=1)[None]


def near_tie_tokens() -> torch.Tensor:
    """Tokens of all scales for which a quotient can be half a unit of float32 from a tie of e4m3, but for 2^-22 units.

    There a quotient that is not quite exact may be rounded to the other side of the tie. With a scale of the bits S
    and a tie of the bits M, of 24 and 5 bits, that is possible if `S M 2^19 +- S / 2`, the bits of the value, is a
    multiple of 2^23 but for a few units. So S is a multiple of 2^20 but for a few units.
    """
    bits = torch.arange(8, 17)[:, None] * 2**20 + torch.arange(-12, 13)
    scales = bits[(bits >= 2**23) & (bits < 2**24)].double() * 2.0**-23
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (numbers[1:] + numbers[:-1]) / 2
    units = 2.0 ** (ties.log2().floor() - 23)  # of float32; half as large below a power of two
    beside = torch.cat([ties + part * units for part in (-0.5, -0.25, 0.25, 0.5)])
    nearest = (scales[:, None] * beside).float().view(torch.int32)
    values = torch.cat([(nearest + delta).view(torch.float32) for delta in (-1, 0, 1)], dim=1)
    largest = (448.0 * scales).float()[:, None]
    return torch.cat([values.minimum(largest), -values.minimum(largest), largest], dim=1)[None]


def run_ties(seed: int, cases: int, backend: str = "extension") -> int:
    """Compares what is seldom found by chance: quotients at and beside ties. Returns how many there were."""
    compared = 0
    for case in range(cases):
        for dtype in FEATURE_DTYPES:
            all_features = [tie_tokens(dtype, seed + case)]
            if dtype == torch.float32 and case == 0:
                all_features.append(near_tie_tokens())
            for features in all_features:
                whole = torch.nn.functional.pad(features, (0, -features.shape[-1] % 16))  # the kernel for whole pieces
                for pushed in (features, whole):
                    rings = both_rings(1, *pushed.shape, dtype=torch.float8_e4m3fn, backend=backend)
                    push_both(rings, pushed, 0.5)
                    compared += pushed.numel()
    return compared


def run_large(seed: int, backend: str = "extension") -> int:
    """Compares samples that many blocks or threads share, and blocks with several rounds; returns how many pushes."""
    generator = torch.Generator().manual_seed(seed)
    on_cpu = op._where(torch.empty(0))[0] < 0
    kinds = [((2, 96, 750), FEATURE_DTYPES, 4), ((40, 26, 333), (torch.float32,), 2)]
    kinds += [((2, 801, 701), FEATURE_DTYPES, 1)] if on_cpu else []  # above the size from which threads are used
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if on_cpu else 1)
    pushes = 0
    for dtype, (sizes, sources, steps) in itertools.product(STORAGE_DTYPES, kinds):
        batch, tokens, dim = sizes
        rings = both_rings(2, *sizes, dtype=dtype, backend=backend)
        for step, source, gap in itertools.product(range(steps), sources, (0, 1)):
            rows = torch.randperm(batch, generator=generator)
            # Smaller, equal and greater levels, and NaN, after which a block that saw the new state would append.
            newest = rings[1].sigmas[rings[1].cursor[rows].long() - 1, rows]
            sigma = newest + torch.tensor([-0.125, 0.0, 0.125, float("nan")])[(rows + step) % 4]
            features = torch.randn(batch, tokens, dim + gap, generator=generator).to(source)[..., :dim]
            push_both(rings, features, sigma, rows)
            pushes += 1
            if sizes == kinds[0][0] and not on_cpu:
                launched = ctypes.c_int.in_dll(ctypes.CDLL(extension().__file__), "cuda_on_cpu_launch_blocks")
                assert launched.value >= 8 * batch, launched
        for age in range(2):
            assert_same_bytes(rings[0].gather(age), rings[1].gather(age), f"gather({age})")
    torch.set_num_threads(threads)
    return pushes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="random rings; default: 1000")
    parser.add_argument("--ties", type=int, default=0, help="rounds of quotients at ties; default: 0")
    parser.add_argument("--large", action="store_true", help="samples that many blocks or threads share")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; default: 0")
    parser.add_argument("--kernels", action="store_true", help="run the CUDA kernels, built to run on the CPU")
    options = parser.parse_args()
    if options.kernels:
        op._where = lambda tensor: (0, 0)  # to the compiled code, CPU tensors are then on device 0
    torch.set_num_threads(1)  # the tensors are small, and threads that wait spin
    work = {
        "cases": lambda: run(options.seed, options.cases),
        "ties": lambda: run_ties(options.seed, options.ties),
        "large pushes": lambda: run_large(options.seed) if options.large else 0,
    }
    failed = False
    for name, function in work.items():
        start = time.monotonic()
        try:
            done = function()
        except AssertionError:
            traceback.print_exc()
            failed = True
        else:
            print(f"{done} {name} in {time.monotonic() - start:.1f} s, {extension().__file__}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
