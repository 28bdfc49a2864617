"""Compares random pushes into feature rings, and reads from them, with the plain torch form, byte by byte.

As a program, `python ring_fuzz.py --cases 1000` runs the compiled extension of the lesa_kernels that Python finds, and
with `--kernels` its CUDA kernels, where they were built to run on the CPU (see `cuda_on_cpu/`).
"""

import argparse
import random
import time

import torch

from lesa_kernels import FeatureRing
from lesa_kernels._extension import extension
from lesa_kernels.feature_ring import op

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGE_DTYPES = (*FEATURE_DTYPES, torch.float8_e4m3fn)
SLACK = 31  # elements that a buffer may begin after the beginning of its memory
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Raises unless the bytes are equal; only the payload of a NaN may differ."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
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
    for kind, factor in ((0, 0.0), (1, -0.0), (2, 1e-41), (3, 1e-7), (4, 1e30), (5, 448.0)):
        values[kinds == kind] *= factor
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
    """Below, at and above the newest levels, or NaN."""
    if rng.random() < 0.3:
        return rng.random()
    levels = []
    for row in rows:
        newest = float(ring.sigmas[(int(ring.cursor[row]) - 1) % ring.capacity, row])
        levels.append(rng.choice((newest * 0.9, newest * 0.9, newest - 0.125, newest, newest + 0.5, float("nan"))))
    return torch.tensor(levels)


def random_rows(rng: random.Random, batch: int) -> list[int] | None:
    if rng.random() < 0.5:
        return None
    return rng.sample(range(batch), rng.randint(0, batch))


class Case:
    """A ring that is worked with twice: with what is tested, and in plain torch."""

    def __init__(self, rng: random.Random, backend: str = "extension"):
        self.rng = rng
        dim = rng.choice((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 48, 64, 65, 128, 200, 513, rng.randint(1, 300)))
        if rng.random() < 0.02:
            dim = rng.choice((3072, 3073, 4100))  # beyond what a warp keeps of a token
        tokens = rng.choice((0, 1, 1, 2, 3, 5, 8, 9, rng.randint(1, 40))) if dim < 1000 else rng.randint(1, 3)
        sizes = (rng.choice((1, 1, 2, 3, 5)), rng.randint(1, 4), tokens, dim)
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
        listed = list(range(self.plain.batch)) if rows is None else rows
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
        ring, rng = self.tested, self.rng
        state = (ring.storage, ring.scales, ring.sigmas, ring.cursor, ring.count)
        features, sigma = torch.ones(ring.batch, ring.tokens, ring.dim), torch.ones(ring.batch)
        arguments = list(op.push_arguments(*state, features, sigma, None))
        empty = features.numel() == 0
        negative, huge = -rng.randint(1, 2**40), 2 ** rng.randint(50, 62)
        sizes = list(ring.storage.shape)
        sizes[rng.randrange(4)] = rng.choice((negative, *([] if empty else [huge])))
        strides = list(features.stride())
        strides[rng.randrange(3)] = negative
        bad = {1: ["int8", ""], 2: [sizes], 4: [0], 5: [0], 6: [0], 8: ["float64", "float8_e4m3fn"], 9: [strides]}
        bad |= {13: [negative, ring.batch + 1], 14: [-2], 16: [0, -1]}
        if not empty:
            bad |= {0: [0, arguments[0] + 1] if ring.storage.itemsize > 1 else [0], 7: [0, arguments[7] + 1]}
            if ring.scales is None:
                bad[3] = [features.data_ptr()]
            else:
                bad[3] = [0, arguments[3] + 2]
        place = rng.choice(sorted(bad))
        arguments[place] = rng.choice(bad[place])
        try:
            extension().ring_push(*arguments)
        except ValueError as error:
            assert "must" in str(error), error
        else:
            raise AssertionError(f"argument {place} was taken as {arguments[place]!r}")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; default: 0")
    parser.add_argument("--kernels", action="store_true", help="run the CUDA kernels, built to run on the CPU")
    options = parser.parse_args()
    if options.kernels:
        op._where = lambda tensor: (0, 0)  # to the compiled code, CPU tensors are then on device 0
    start = time.monotonic()
    done = run(options.seed, options.cases)
    print(f"{done} cases in {time.monotonic() - start:.1f} s, {extension().__file__}")


if __name__ == "__main__":
    main()
