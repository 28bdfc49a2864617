"""The definition of a push into the feature ring, in plain torch."""

import torch


def newest_slots(cursor: torch.Tensor, count: torch.Tensor, capacity: int) -> torch.Tensor:
    """The slots of each row's anchors, newest first: `[capacity, B]`. Beyond `count` the oldest one's is repeated."""
    order = torch.arange(capacity, device=cursor.device)[:, None]
    return (cursor - 1 - torch.minimum(order, (count - 1).clamp(min=0))) % capacity


@torch.no_grad()
def ring_push_ref(
    storage: torch.Tensor,
    sigmas: torch.Tensor,
    cursor: torch.Tensor,
    count: torch.Tensor,
    features: torch.Tensor,
    sigma: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Stores one feature per sample, in place. Arguments as in `ring_push`; nothing waits for the device.

    Per sample, by its sigma against that of the row's newest anchor: a smaller one is appended, over the oldest anchor
    when the ring is full; an equal one replaces the newest; any other (greater, or NaN) starts a new history.
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
    storage[slot, rows] = features.to(storage.dtype)
    sigmas[slot, rows] = sigma
    appended = torch.where(extends, (valid + 1).clamp(max=capacity), torch.ones_like(valid))
    count[rows] = torch.where(replaces, valid, appended)
    cursor[rows] = torch.where(replaces, append_slot, (append_slot + 1) % capacity).to(cursor.dtype)
