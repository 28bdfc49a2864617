from __future__ import annotations
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    architecture: int
    multiprocessors: int


def cdiv(a, b):
    return -(-a // b)


def power(n, minimum=1):
    p = minimum
    while p < n:
        p *= 2
    return p


def E(name, default):
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class ForecastLaunch:
    programs: int
    groups: int
    block_t: int
    block_d: int
    stages: int
    warps: int

    @classmethod
    def of(cls, device, batch, tokens, width, history, dtype):
        bd = min(E("FBD", 256), power(width, 16))
        bt = E("FBT", 16)
        blocks = cdiv(width, bd)
        groups = max(1, E("FP", 2) * device.multiprocessors // (batch * blocks))
        groups = min(groups, tokens)
        return cls(batch * blocks * groups, groups, bt, bd, E("FST", 3), E("FW", 8))


@dataclass(frozen=True)
class SumsLaunch:
    programs: int
    groups: int
    splits: int
    rounds: int
    together: int
    scratch: int
    block_t: int
    block_d: int
    block_o: int
    block_r: int
    by_rank: int
    part: int
    chunk: int
    stages: int
    warps: int

    @classmethod
    def of(cls, device, batch, tokens, width, history, outs, rank, dtype):
        bt, bd, st, w = E("BT", 64), min(E("BD", 64), power(width, 16)), E("ST", 3), E("W", 4)
        splits = E("SP", 4)
        bo, br = power(outs, E('BO',16)), power(rank, E('BR',16))
        groups = min(tokens, max(1, 2 * device.multiprocessors // (batch * splits)))
        tiles = cdiv(cdiv(tokens, groups), bt)
        rounds, together = (1, tiles) if splits > 1 else (tiles, 1)
        by_rank = bt * (2 + (bo if outs else 0))
        part = by_rank + (bt * br * (2 if outs else 1) if rank else 0)
        return cls(batch * groups * splits, groups, splits, rounds, together,
                   batch * groups * splits * together * part, bt, bd, bo, br, by_rank, part, E("CH", 64), st, w)
