"""The definition of a push into the feature ring, and of a read from it, in plain torch."""

import torch

RingBuffers = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]
"""`(storage, scales, sigmas, cursor, count)`, the order of all operations on rings."""


def newest_slots(cursor: torch.Tensor, count: torch.Tensor, capacity: int) -> torch.Tensor:
    """The slots of each row's anchors, newest first: `[capacity, B]`. Beyond `count` the oldest slot is repeated."""
    order = torch.arange(capacity, device=cursor.device)[:, None]
    return (cursor - 1 - torch.minimum(order, (count - 1).clamp(min=0))) % capacity


FLOAT8_MAX = 448.0  # of e4m3


def quantise_float8(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as e4m3 with one scale per token: `[..., D]` -> float8_e4m3fn `[..., D]` and float32 `[...]`.

    The scale is the token's largest magnitude over 448, so that every value fits; it is one for a token of zeros.
    Values are divided by the scale and rounded to the nearest even. A token with a value that is not finite has the
    scale NaN.
    """
    features = features.float()
    if features.shape[-1] == 0:
        return features.to(torch.float8_e4m3fn), features.new_ones(features.shape[:-1])
    largest = features.abs().amax(-1)
    # A tensor of 448, since a GPU would replace the division by a number with a product.
    scale = largest / torch.full_like(largest, FLOAT8_MAX)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = torch.where(features.isfinite().all(-1), scale, torch.full_like(scale, float("nan")))
    values = (features / scale.unsqueeze(-1)).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def dequantise_float8(features: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantise_float8`: float32 values."""
    return features.float() * scales.unsqueeze(-1)


@torch.no_grad()
def ring_push_ref(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Stores one feature per sample, in place. Arguments as in `ring_push`; nothing waits for the device.

    For each sample its sigma is compared with that of the row's newest anchor. If it is smaller, the feature is
    appended, over the oldest anchor when the ring is full. If it is equal, the feature replaces the newest one.
    Otherwise (greater, or NaN) a new history starts.
    """
    capacity, batch = sigmas.shape
    if rows is None:
        rows = torch.arange(batch, device=storage.device)
    append_slot = cursor[rows].long()
    valid = count[rows]
    newest_slot = (append_slot - 1) % capacity
    newest_sigma = sigmas[newest_slot, rows]
    replaces = (valid > 0) & (sigma == newest_sigma)
    extends = (valid > 0) & (sigma < newest_sigma)

    slot = torch.where(replaces, newest_slot, append_slot)
    if scales is None:
        storage[slot, rows] = features.to(storage.dtype)
    else:
        values, scales[slot, rows] = quantise_float8(features)
        storage.view(torch.uint8)[slot, rows] = values.view(torch.uint8)  # torch can't assign float8 by index
    sigmas[slot, rows] = sigma
    appended = torch.where(extends, (valid + 1).clamp(max=capacity), torch.ones_like(valid))
    count[rows] = torch.where(replaces, valid, appended)
    cursor[rows] = torch.where(replaces, append_slot, (append_slot + 1) % capacity).to(cursor.dtype)


@torch.no_grad()
def ring_gather_ref(
    storage: torch.Tensor,
    scales: torch.Tensor | None,
    cursor: torch.Tensor,
    count: torch.Tensor,
    age: int = 0,
) -> torch.Tensor:
    """Reads one feature of each row. Arguments as in `ring_gather`; nothing waits for the device."""
    slots = newest_slots(cursor, count, storage.shape[0])[age]
    rows = torch.arange(storage.shape[1], device=storage.device)
    features = storage[slots, rows]
    if scales is not None:
        features = dequantise_float8(features, scales[slots, rows])
    return features.masked_fill_((count == 0)[:, None, None], float("nan"))
