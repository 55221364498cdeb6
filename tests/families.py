"""The smallest classifier of every timm family, tests/families.json; `python tests/families.py` computes it anew.

A family is a module of timm.models, divided by model class and kind of classifier (a distilled DeiT has two heads).
Parameters are counted on the meta device, so no weights are drawn; a quarter of an hour on one core.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fmnist.config.schema import ModelConfig
from fmnist.models import build_model

TABLE = Path(__file__).with_name("families.json")
SIZES = (32, 64, 96, 128, 160, 192, 224)
LARGE = 150e6  # parameters; such a model is tried with two blocks


def read_families() -> list[dict[str, Any]]:
    """Return one entry a family: `family`, `model`, `size` in pixels, `options`, `parameters` (of 1000 classes),
    and `refused`, the reason, where it cannot be trained."""
    return json.loads(TABLE.read_text())


def kind_of(model: nn.Module) -> tuple[str, str]:
    """Return the class of a model and of its classifier, e.g. ("DPN", "Conv2d"), ("Levit", "NormLinear+NormLinear")."""
    found: Any = model.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple) else (found,)
    return type(model).__name__, "+".join(type(head).__name__ for head in heads)


def smallest_models() -> list[dict[str, Any]]:
    """Look through timm's registry for the model of each family that has the fewest parameters."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                model = timm.create_model(name)
            if not hasattr(model, "get_classifier"):  # an encoder
                continue
            count = sum(p.numel() for p in model.parameters())
            entry = {"family": family, "model": name, "parameters": count}
            key = (family, *kind_of(model))
            best[key] = min(best.get(key, entry), entry, key=lambda found: found["parameters"])
    return sorted(best.values(), key=lambda found: (found["family"], found["parameters"]))


def smallest_size(name: str, options: dict[str, Any]) -> int:
    """Return the smallest of SIZES, or else timm's own size, that the model takes."""
    own = timm.get_pretrained_cfg(name)
    for size in (*SIZES, own.input_size[-1] if own else SIZES[-1]):
        try:
            cfg = ModelConfig(name=name, options=options)
            build_model(cfg, num_classes=10, mean=(0.5,), std=(0.5,), image_size=size, load_weights=False)
            return size
        except ValueError as error:
            reason = error
    raise reason


if __name__ == "__main__":
    entries = smallest_models()
    for entry in entries:
        entry["options"] = {"depth": 2} if entry["parameters"] > LARGE else {}
        try:
            entry["size"] = smallest_size(entry["model"], entry["options"])
        except ValueError as error:
            entry |= {"size": SIZES[-1], "refused": str(error)}
    TABLE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
