"""Pretrained tensors, from a local file or from timm's hub; no code in a file is ever executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import constants as hub
from torch import Tensor

from fmnist.config.schema import WEIGHTS
from fmnist.runtime.probe import answers

HUB_TIMEOUT_S = 5.0


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a file of tensors.

    Args:
        path: .safetensors, or .pt or .pth with a state_dict, plain or under "state_dict" or "model".

    Returns:
        The tensors by name, on the CPU.

    Raises:
        ValueError: no such file, an unreadable one, more than tensors in it, or a non-finite value.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"model.weights: there is no file {path}")
    if file.suffix not in WEIGHTS:
        raise ValueError(f"model.weights: {path} is none of {', '.join(WEIGHTS)}")
    tensors: Any
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(file, device="cpu")
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types; torch's own message advises unsafe loading
        kind = type(error).__name__
        raise ValueError(f"model.weights: {path} is damaged or holds more than tensors ({kind})") from error

    for key in ("state_dict", "model"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"model.weights: {path} is not a state_dict (tensors by name)")
    small = [str(key) for key, value in tensors.items() if value.is_floating_point() and value.itemsize < 2]
    if small:
        raise ValueError(f"model.weights: {path}: {_few(small)} of 8 bits; valid: 16 bits and more")
    if broken := [str(key) for key, value in tensors.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"model.weights: {path}: {_few(broken)} with values that are not finite")
    return dict(tensors)


def fetch_weights(name: str) -> dict[str, Tensor]:
    """Return timm's own weights of a model, from its cache, or from the hub where that answers.

    Args:
        name: a timm model name, with or without the tag of its weights.

    Returns:
        All tensors of the model in timm's own shape, on the CPU.

    Raises:
        ValueError: neither cached nor available; raised after HUB_TIMEOUT_S, name look-up and all.
    """
    offline = hub.HF_HUB_OFFLINE
    try:
        # The client tries each of several files six times: 47 s without a name server, minutes behind a firewall
        # that drops packets. So ask once first; without an answer the client reads only its cache.
        hub.HF_HUB_OFFLINE = offline or not answers(hub.ENDPOINT, HUB_TIMEOUT_S)
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # client, HTTP, file and timm errors alike: the remedy is the same
        kind = type(error).__name__
        raise ValueError(
            f"model.pretrained: the weights of {name} are neither cached nor available ({kind}); download them "
            "once on a machine with network access, or give a local file: model.weights PATH"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = offline


def mismatches(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Compare two sets of tensors by name, shape and type (floating point or not).

    Args:
        tensors: by name, from a file.
        wanted: by name, from the model.

    Returns:
        For each kind of mismatch (missing, unexpected, of another shape, of another type) a count and the first
        names; empty if all agree.
    """
    both = [key for key in wanted if key in tensors]
    shapes = {key: (tuple(tensors[key].shape), tuple(wanted[key].shape)) for key in both}
    kinds = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [str(key) for key in tensors if key not in wanted],
        "of another shape": [f"{key} {a}, not {b}" for key, (a, b) in shapes.items() if a != b],
        "of another type": [key for key in both if tensors[key].is_floating_point() != wanted[key].is_floating_point()],
    }
    return {kind: f"{_few(keys)} {kind}" for kind, keys in kinds.items() if keys}


def _few(keys: list[str]) -> str:
    return f"{len(keys)} tensors ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
