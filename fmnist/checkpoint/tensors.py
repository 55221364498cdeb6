"""Named tensors: out of a model and its optimizer, back into them, and looked at before they are used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fmnist.runtime.console import one_line
from fmnist.runtime.files import cannot_read, open_regular
from fmnist.runtime.muon import Muon

# What safetensors calls the types that models and optimizers hold.
TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name, e.g. {"exp_avg/head.weight": ...}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {f"{key}/{names[id(p)]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def expected_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> set[str]:
    """Return what the optimizer keeps for each parameter of a group once it has made a step."""
    if isinstance(optimizer, Muon) and group["muon"]:
        return {"momentum_buffer"}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    return {"step", "exp_avg", "exp_avg_sq"}


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Put back what `optimizer_tensors` returned; the optimizer casts and moves it as it needs.

    A file holds tensors in contiguous order. They take their parameter's memory format here: torch's fused optimizers
    walk through parameter, gradient and state by one count, and would pair the wrong elements without a word on a CPU.

    Raises:
        ValueError: one line naming the file, and a tensor of no parameter or of another shape, or what is missing.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        parameter = parameters.get(name)
        counts = tensor.dim() == 0  # of steps
        if parameter is None or not (counts or tensor.shape == parameter.shape):
            raise ValueError(f"{source} does not fit the model: {full} {list(tensor.shape)}")
        laid_out = tensor if counts else torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
        states.setdefault(name, {})[key] = laid_out
    wanted = {
        names[id(p)]: expected_state(optimizer, group) for group in optimizer.param_groups for p in group["params"]
    }
    if any(set(states[name]) != wanted[name] for name in states) or (not states and any(wanted.values())):
        found = {key for state in states.values() for key in state}
        raise ValueError(f"{source} does not fit the optimizer: it holds {sorted(found) or 'nothing'}")
    payload = optimizer.state_dict()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    payload["state"] = {i: states[names[id(p)]] for i, p in enumerate(ordered) if names[id(p)] in states}
    optimizer.load_state_dict(payload)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load tensors whose names and shapes are exactly the module's.

    Raises:
        ValueError: one line naming the tensors that are missing, unexpected or of another shape or type, and the file.
    """
    own = module.state_dict()
    wrong = [f"{name} missing" for name in own if name not in tensors]
    wrong += [f"{name} unexpected" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)} not {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    wrong += [  # load_state_dict would cast it in silence
        f"{name} is {tensors[name].dtype} not {own[name].dtype}"
        for name in own
        if name in tensors and tensors[name].dtype != own[name].dtype
    ]
    if wrong:
        raise ValueError(f"{source} does not fit the model: {'; '.join(wrong[:3])} ({len(wrong)} tensors in all)")
    module.load_state_dict(dict(tensors))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host, each to memory of its own: they stay as they are now, and none shares it (CoaT's do).

    From a GPU they come through pinned memory, which its queue fills while the host goes on to the next.
    """
    copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach(), non_blocking=True)
    for device in {tensor.device for tensor in tensors.values()} - {torch.device("cpu")}:
        torch.accelerator.synchronize(device)
    return copies


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file, not yet forced to the disk.

    The library would first copy all of it to one block, and leave the hash to be read back.

    Returns:
        Its size in bytes and its sha256, taken on the way.

    Raises:
        OSError: one line naming the file, which cannot be written.
        ValueError: a tensor of a type that no model has.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that each is aligned
    header, size = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in TYPES:
            raise ValueError(f"{path} cannot be written: {name} is {tensor.dtype}, which no checkpoint holds")
        begin, size = size, size + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for part in (len(text).to_bytes(8, "little") + text, *map(_bytes, map(tensors.__getitem__, order))):
                digest.update(part)  # this and the write let other threads run
                file.write(part)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    return 8 + len(text) + size, digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor, without a copy where it is contiguous on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors that hold a NaN or an infinity."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
    if not floats:  # an optimizer without momentum has no state
        return []
    verdicts = torch.stack([t.isfinite().all() for t in floats.values()]).tolist()  # one device sync for all
    return [name for name, fine in zip(floats, verdicts, strict=True) if not fine]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: one line, for a file that is missing or not safetensors.
    """
    return read_tensors_and_digest(path)[0]


def read_tensors_and_digest(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a safetensors file, and the sha256 of the very bytes that the tensors were read from.

    Raises:
        ValueError: one line, for a file that is missing or not safetensors.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
        tensors = load(data)
    except OSError as error:
        raise cannot_read(path, error) from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # of types that torch does not know, too
        raise ValueError(f"{path} cannot be read: {one_line(error, 120)}") from None
    if odd := [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize < 2]:
        raise ValueError(f"{path} cannot be read: {odd[0]} is {tensors[odd[0]].dtype}, which no run writes")
    return tensors, hashlib.sha256(data).hexdigest()
