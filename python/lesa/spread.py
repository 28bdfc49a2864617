"""Models of which this process does not hold all weights or tokens: they are spread over processes, or offloaded."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from lesa_kernels.checks import Said, argument_error

_TENSOR, _SHARDED, _WRAPPER = (
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)


def _is_a(thing: Any, kind: tuple[str, str]) -> bool:
    """Whether something is of a class of torch. Nothing is, if nobody has imported the module of that class."""
    module, name = kind
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(thing, found)


def is_spread(module: Any) -> bool:
    """Whether a model is spread over processes, so that they must call it together.

    It is, under context or tensor parallelism of diffusers, and if its weights are sharded by `fully_shard`, by
    `FullyShardedDataParallel` or by `parallelize_module` of torch.
    """
    if not isinstance(module, torch.nn.Module):
        return False
    if getattr(module, "_parallel_config", None) is not None:
        return True
    parts = module.modules()
    if any(_is_a(part, _SHARDED) or _is_a(part, _WRAPPER) for part in parts):
        return True
    return any(is_sharded(weight) for weight in module.parameters())


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor has its values in several processes."""
    return _is_a(tensor, _TENSOR)


def check_not_packed(module: torch.nn.Module) -> None:
    """Raises `TypeError` if the weights of a part are packed into others, of which each process has a part."""
    if any(_is_a(part, _WRAPPER) for part in module.modules()):
        must, got = "have weights that can be compared with those of other runs", "weights that FSDP has packed"
        remedy = "Shard them with `torch.distributed.fsdp.fully_shard` instead of `FullyShardedDataParallel`."
        raise argument_error("pipe", must, Said(got), remedy, TypeError)


def inside_of(module: Any) -> torch.nn.Module | None:
    """What a module like `DistributedDataParallel` is around; None if it is around nothing."""
    inside = getattr(module, "module", None)
    is_wrapper = isinstance(module, torch.nn.Module) and [*module.children()] == [inside]
    return inside if is_wrapper else None


def execution_device(module: torch.nn.Module) -> torch.device | None:
    """The device to which hooks of accelerate bring a module and what it gets; None if there are no such hooks."""
    for part in module.modules():
        for hook in _hooks_of_accelerate(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device  # with its index
    return None


def class_of(thing: Any) -> type:
    """The class of something, without the one that `fully_shard` puts in front of it."""
    if not _is_a(thing, _SHARDED):
        return type(thing)
    sharded = getattr(sys.modules[_SHARDED[0]], _SHARDED[1])
    return next(base for base in type(thing).__mro__ if not issubclass(base, sharded))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded."""
    local: Any = tensor
    return local.to_local() if is_sharded(tensor) else tensor


def reshard(module: torch.nn.Module) -> None:
    """Gives back the weights that `fully_shard` has gathered in an earlier call and kept. The next call gathers them.

    Gathered weights may have another dtype.
    """
    for part in module.modules():
        if _is_a(part, _SHARDED):
            sharded: Any = part
            sharded.reshard()


def unshard(module: torch.nn.Module) -> None:
    """Gathers the weights of those parts of a module that `fully_shard` was called on, as their own calls would do.

    All processes must call it, in a call of the whole model.
    """
    for part in module.modules():
        if _is_a(part, _SHARDED):
            sharded: Any = part
            sharded.unshard()


def sum_over_processes(total: int, tensor: Any) -> int:
    """The sum of what each process has for its part of a sharded tensor. All processes must call it."""
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            value = torch.tensor(total, dtype=torch.int64, device=mesh.device_type)
            dist.all_reduce(value, group=mesh.get_group(dim))
            total = int(value)
    return total


def whole(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of a module with all its values, on the device where the module computes.

    If it is sharded, all processes must call this.

    Args:
        module: the module that has it.
        name: of the attribute.

    Raises:
        RuntimeError: the values are elsewhere, and nothing says where.
    """
    value: Any = getattr(module, name, None)
    if value is None:
        return None
    if is_sharded(value):
        return value.full_tensor()
    elsewhere = dict(_elsewhere(module))
    if name in elsewhere:
        read, device = elsewhere[name]
        return read().to(value.device if device is None else device, value.dtype)
    if value.is_meta:
        must, got = "have an output head whose weights can be read", Said(f"a `{name}` on the meta device")
        raise argument_error("pipe", must, got, "Do not offload the output head.", RuntimeError)
    return value


def all_tokens(features: torch.Tensor, tokens: int, transformer: Any) -> torch.Tensor:
    """The features of all tokens. Under context parallelism each process has some of them, and all must call this.

    Args:
        features: `[B, T, D]` of this process.
        tokens: how many there are in all processes.
        transformer: that made them.

    Raises:
        RuntimeError: the features are of fewer tokens, and diffusers did not divide them.
    """
    if features.shape[1] == tokens:
        return features
    parallel = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    mesh: Any = getattr(parallel, "_flattened_mesh", None)
    most, left = divmod(tokens, 1 if mesh is None else mesh.size())
    sizes = [most + (rank < left) for rank in range(1 if mesh is None else mesh.size())]
    if mesh is None or features.shape[1] != sizes[dist.get_rank(mesh.get_group())]:
        must, got = f"give features of {tokens} tokens, or equal parts of them", Said(f"{features.shape[1]} tokens")
        remedy = "Divide the tokens with `enable_parallelism` of diffusers, or let each process have all of them."
        raise argument_error("pipe", must, got, remedy, RuntimeError)
    own = torch.nn.functional.pad(features, (0, 0, 0, sizes[0] - features.shape[1])).contiguous()
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own, group=mesh.get_group())
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes)], 1)


def values_elsewhere(module: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """By the names of parameters and buffers that are offloaded, functions that read their values."""
    found = {}
    for path, part in module.named_modules():
        for name, (read, _) in _elsewhere(part):
            found[f"{path}.{name}" if path else name] = read
    return found


_Kept = tuple[str, tuple[Callable[[], torch.Tensor], Any]]


def _elsewhere(part: torch.nn.Module) -> Iterator[_Kept]:
    """The names of tensors that hooks of a module keep elsewhere. For each, what reads it, and where it is needed."""
    for hook in _hooks_of_accelerate(part):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and hook.offload:
            for name, tensor in _tensors(part, hook.place_submodules):
                if tensor.is_meta:
                    yield name, (functools.partial(weights.__getitem__, name), hook.execution_device)
    registry = vars(part).get("_diffusers_hook")
    group: Any = getattr(None if registry is None else registry.get_hook("group_offloading"), "group", None)
    if getattr(group, "offload_to_disk_path", None) is not None:
        keys = {id(tensor): key for tensor, key in group.tensor_to_key.items()}
        for name, tensor in _tensors(part, True):
            if id(tensor) in keys:
                yield name, (functools.partial(_read, group.safetensors_file_path, keys[id(tensor)]), None)


def _hooks_of_accelerate(part: torch.nn.Module) -> Sequence[Any]:
    hook: Any = vars(part).get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _tensors(part: torch.nn.Module, recurse: bool) -> list[tuple[str, torch.Tensor]]:
    return [*part.named_parameters(recurse=recurse), *part.named_buffers(recurse=recurse)]


def _read(path: str, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
