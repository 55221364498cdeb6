"""Mistakes in names of files and models that can be seen without torch, which takes seconds to import."""

import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from fmnist.config.same_run import OF_A_START, is_run_yaml
from fmnist.config.schema import WEIGHTS, Config, check_name

OURS = Path(__file__).resolve().parent.parent / "models" / "__init__.py"  # its REGISTRY names our own
NEEDS_ROOT = {"npz": "a file of arrays", "folder": "a folder with a folder of pictures for each class"}


def look(cfg: Config) -> None:
    """Refuse a folder, file or model that is not there, before a run that begins.

    Raises:
        ValueError: one line with the option and its value.
    """
    check_name("the last part of output_dir", Path(cfg.output_dir or "run").resolve().name)
    data, root, weights = cfg.data.name, cfg.data.root, cfg.model.weights
    begun = os.path.exists(os.path.join(cfg.output_dir or "", "config.yaml"))  # it may be finished, and need neither
    if root is None and data in NEEDS_ROOT:
        raise ValueError(f"data.name is {data}, which needs {NEEDS_ROOT[data]}: --data.root PATH")
    path = os.path.expanduser(root or "")
    if root is not None and not begun and not (os.path.isfile if data == "npz" else os.path.isdir)(path):
        found = ("a folder" if data == "npz" else "a file") if os.path.exists(path) else "no such folder"
        if data in NEEDS_ROOT:
            raise ValueError(f"data.root is {path}, expected {NEEDS_ROOT[data]}: found {found}")
        title = "Fashion-MNIST" if data == "fashion_mnist" else data
        raise ValueError(f"data.root: no {title} in {path}: found {found}; leave data.root out and train.py fetches it")
    corrections = cfg.data.corrections
    if corrections is not None and not begun and not os.path.isfile(os.path.expanduser(corrections)):
        raise ValueError(f"data.corrections: there is no file {corrections}")
    if weights is not None and not begun:
        if not os.path.exists(weights):
            without = "; leave it out and timm fetches the weights of model.pretrained" if cfg.model.pretrained else ""
            raise ValueError(f"model.weights: there is no file {weights}{without}")
        if cfg.model.starts_from_run != os.path.isdir(weights):
            raise ValueError(f"model.weights: {weights} is none of {', '.join(WEIGHTS)}, and no run or checkpoint")
    own = [Path(cfg.output_dir, name) for name in ("", "model.safetensors", "checkpoints")] if cfg.output_dir else []
    if weights is not None and {path.resolve() for path in own} & {(at := Path(weights).resolve()), at.parent}:
        raise ValueError(f"model.weights: {weights} is of the run in output_dir itself: give another --output_dir")
    _look_for_model(cfg.model.name)


def misplaced(file: Path, content: Any) -> str:
    """Say that a run's own config.yaml lies elsewhere than in its output_dir; empty where it does not.

    Args:
        file: a config file.
        content: of it; what --print_config prints has the options of a start, a run's own has none.
    """
    place = content.get("output_dir") if is_run_yaml(content) and not content.keys() & {*OF_A_START} else None
    here = file.parent
    if file.name != "config.yaml" or place is None or os.path.realpath(place) == os.path.realpath(here):
        return ""
    return (
        f"--config {file} is of a run whose output_dir is {place}, but lies in {here}: the run was copied or moved, or "
        f"began in another working directory. Give --output_dir {here} to use the run here, or --output_dir {place} "
        "to use that one"
    )


def _look_for_model(name: str) -> None:
    """Refuse a name that stands nowhere in our registry and timm's sources; timm itself says whether it is a model."""
    registry = re.findall(r'^    "(\w+)": \w+,$', OURS.read_text(encoding="utf-8"), re.MULTILINE)
    if (models := sys.modules.get("fmnist.models")) is not None:  # a notebook may have put its own into it
        registry = list(models.REGISTRY)
    timm = importlib.util.find_spec("timm")
    if name in registry or timm is None or timm.origin is None:
        return
    text = "\n".join(path.read_text(encoding="utf-8") for path in (Path(timm.origin).parent / "models").glob("*.py"))
    if re.search(rf"\b{re.escape(name.partition('.')[0])}\b", text):
        return
    known = [*registry, *re.findall(r"^@register_model\ndef (\w+)", text, re.MULTILINE)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(f"model.name: unknown model {name!r}; nearest: {', '.join(near) or 'none'}")
