"""A run as a folder for a model hub: config.json, model.safetensors, a model card, and the run's config."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from fmnist.apps.export.expected import Expected, Measured, read_measured
from fmnist.apps.export.model_card import model_card, own_licence
from fmnist.apps.export.preprocess import level_read, means
from fmnist.checkpoint.tensors import apart
from fmnist.config.schema import to_yaml
from fmnist.data.augment import with_channels
from fmnist.data.info import DATA_FILE
from fmnist.runtime.files import temporary_folder, write_atomic
from fmnist.trained import Trained, open_trained

LARGEST_DIFFERENCE = 1e-5  # of any logit; where logits exceed 10, in proportion: fp32 rounds so
# Of timm's description of a model: where its own weights come from, and what is said of those.
OF_THE_SOURCE = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "tag"),
    *("label_names", "label_descriptions", "label_offset", "notes", "min_input_size"),
    *("test_input_size", "test_pool_size", "test_crop_pct"),
}
# The files of the folder, and what tells an earlier export's from somebody else's.
FILES = {
    "config.json": b'"label_names"',
    "model.safetensors": b'"made_by":"fmnist"',
    "config.yaml": b"global_batch_size:",
    DATA_FILE: b'"class_names"',
    "README.md": b"\n- fmnist\n",
}


def write_hub(expected: Expected, folder: Path) -> str:
    """Write the folder where a fresh load of it agrees with the run, else leave none; return the check's result.

    Args:
        expected: the run and its answers.
        folder: made if absent; files of the same names in it are replaced.

    Raises:
        ValueError: one line: the run has no metrics, or the folder, opened again, gives other numbers.
    """
    trained = expected.trained
    ours = not timm.is_model(trained.cfg.model.name)
    measured = read_measured(expected)
    with temporary_folder(folder) as part:
        write_files(trained, measured, part, ours)
        difference = check(part, expected, ours)
        configs = ("config.yaml", "config.json")
        for file in configs:  # by which the folder is opened: last, so that nothing opens a mix of two models
            (folder / file).unlink(missing_ok=True)
        for file in (*(file for file in FILES if file not in configs), *configs):
            write_atomic(folder / file, (part / file).read_bytes())
    opener = f'open_trained(Path("{folder}"))' if ours else f'timm.create_model("local-dir:{folder}", pretrained=True)'
    seen = f"{len(expected.images):,} {expected.split} images"
    return f"{folder}: {opener} gives the run's logits within {difference:.1e} on {seen}"


def write_files(trained: Trained, measured: Measured, folder: Path, ours: bool) -> None:
    """Write the files."""
    cfg, augment, size = trained.cfg.model, trained.augment, trained.size
    names = {"num_classes": len(trained.class_names), "label_names": list(trained.class_names)}
    weights = save(apart(trained.model.state_dict()), metadata={"format": "pt", "made_by": "fmnist"})
    (folder / "model.safetensors").write_bytes(weights)  # by us: the library's own file is closed to a group
    if ours:  # timm does not know them, and says so when it is asked to build one
        about = names | {
            "library_name": "fmnist",
            "architecture": cfg.name,
            "model_args": {"drop_rate": cfg.drop_rate} | cfg.options,
            "image_size": size,
            "mean": list(augment.mean),
            "std": list(augment.std),
        }
    else:
        known = timm.get_pretrained_cfg(cfg.name)
        licence = known.license if known is not None and cfg.has_pretrained_input else own_licence(trained)
        remarks = [f"weights sha256 {trained.digest}"]
        if level := level_read(trained.info.shape, size):
            remarks.append(f"images are averaged over {2**level} x {2**level} pixels, then resized: see README.md")
        notes = {"license": licence, "notes": remarks}
        about = _timm_config(trained, notes) | names
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(_portable_config(trained), encoding="utf-8")
    (folder / DATA_FILE).write_text(json.dumps(trained.info.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(trained, measured, ours=ours), encoding="utf-8")


def _timm_config(trained: Trained, notes: dict[str, Any]) -> dict[str, Any]:
    """Describe the model as timm's `local-dir:` and `hf-hub:` read it: how to build it, and the images it takes."""
    model, augment, size = trained.model, trained.augment, trained.size
    kept = {key: value for key, value in model.pretrained_cfg.items() if value is not None and key not in OF_THE_SOURCE}  # type: ignore[union-attr,operator]
    images = {
        "input_size": (len(augment.mean), size, size),
        "interpolation": "bilinear",
        "mean": tuple(augment.mean),
        "std": tuple(augment.std),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return {
        "architecture": kept.pop("architecture"),
        "num_features": model.num_features,
        # timm may have built three channels; the stem was made grey afterwards
        "model_args": {"in_chans": len(augment.mean)} | trained.cfg.model.options,
        "pretrained_cfg": kept | images | {"num_classes": len(trained.class_names), "pool_size": None} | notes,
    }


def _portable_config(trained: Trained) -> str:
    """The run's config without paths or accounts of the machine it ran on."""
    cfg = trained.cfg
    # Weights from a file and from timm's hub give one structure; the file itself is not needed any more.
    model = replace(cfg.model, pretrained=cfg.model.has_pretrained_input, weights=None)
    model = replace(model, precision="auto")
    name = trained.directory.resolve().name
    cfg = replace(
        cfg,
        model=model,
        data=replace(cfg.data, root=None, corrections=None),
        log=type(cfg.log)(),
        output_dir=f"runs/{name}",
    )
    return to_yaml(cfg)


def check(folder: Path, expected: Expected, ours: bool) -> float:
    """Open the folder as a user would and compare logits on the expected images.

    Args:
        folder: what was written.
        expected: the run's images and logits.
        ours: open it with fmnist; else with timm.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: one line, for a folder that cannot be opened, or a difference that is not under LARGEST_DIFFERENCE.
    """
    try:
        logits = open_trained(folder, "cpu")(expected.images)[0] if ours else _timm_logits(folder, expected)
    except Exception as error:  # whatever timm or torch make of it: the folder is of no use
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the folder cannot be opened again: {reason}") from error
    difference = float((logits - expected.logits).abs().max())
    limit = LARGEST_DIFFERENCE * max(1.0, float(expected.logits.abs().max()) / 10)
    if not difference < limit:  # a NaN does not pass
        raise ValueError(f"the folder's logits differ from the run's by {difference:.1e}; the limit is {limit:.0e}")
    return difference


@torch.no_grad()
def _timm_logits(folder: Path, expected: Expected) -> Tensor:
    """As the model card tells a user to: nothing of fmnist, the numbers from config.json."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    _, *size = cfg["input_size"]
    level, logits = level_read(expected.images.shape, min(size)), []
    for part in with_channels(expected.images).split(250):
        pixels = means(part, level) if level else part.float()
        scaled = F.interpolate(pixels / 255, tuple(size), mode="bilinear", align_corners=False)
        logits.append(model((scaled - mean) / std))
    return torch.cat(logits)
