"""Named tensors: out of a model and its optimizer, back into them, and looked at before they are used."""

import hashlib
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

    Raises:
        ValueError: one line naming the file, and a tensor of no parameter or of another shape, or what is missing.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if name not in shapes or (tensor.dim() > 0 and tensor.shape != shapes[name]):  # a step count has no dimension
            raise ValueError(f"{source} does not fit the model: {full} {list(tensor.shape)}")
        states.setdefault(name, {})[key] = tensor
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
    """Return the tensors on the CPU, each with memory of its own, as safetensors wants them (CoaT ties weights)."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


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
