"""The images of a run: read, moved to their place, and cut into batches."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from fmnist.config.schema import Config
from fmnist.data.augment import pyramid_bytes
from fmnist.data.balance import class_weights
from fmnist.data.batches import Loader
from fmnist.data.placement import Placement, choose_place, place
from fmnist.data.registry import open_source
from fmnist.data.split import Split
from fmnist.run import Run

logger = logging.getLogger("fmnist")


def load_splits(cfg: Config, run: Run) -> tuple[dict[str, Split], Placement]:
    """Load train, val and test, in this order, fetched where no folder was named, and move them to their place."""

    def load() -> dict[str, Split]:
        source = open_source(cfg.data, fetch=True, processes=run)
        if cfg.data.name == "folder":
            _check_output(run.directory, Path(cfg.data.root or "").expanduser(), source.files)
        for line in source.remarks(cfg.data):
            logger.warning("%s", line)
        return {name: Split.load(name, source, read=False) for name in ("train", "val", "test")}

    splits = run.together(load)
    pyramid = pyramid_bytes(cfg.augment, splits["train"].images)
    batch_size = cfg.evaluation.batch_size
    placement = choose_place(cfg.data.where, splits, batch_size, pyramid, run, run.device)
    return place(splits, placement, run, run.device, batch_size), placement


def _check_output(directory: Path, root: Path, pictures: Sequence[str]) -> None:
    """Refuse a run directory among the pictures: the next run would take it for a class, or its class for a run."""
    folders = [root / name for name in {"", *map(os.path.dirname, pictures)}]
    if os.path.realpath(directory) in map(os.path.realpath, folders):
        raise ValueError(f"output_dir {directory} holds the pictures of data.root; give another place")


def build_loader(cfg: Config, run: Run, split: Split, placement: Placement) -> Loader:
    """Return what cuts the training images into this process's batches."""
    if cfg.exact and cfg.exact % run.world_size:
        raise ValueError(f"exact is {cfg.exact}; valid with {run.world_size} processes: a multiple of that")
    batch = cfg.batch
    micro = batch.global_batch_size // cfg.exact if cfg.exact else batch.micro_batch_size
    return Loader(
        split,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=None if micro == "auto" else micro,
        seed=cfg.seed,
        rank=run.rank,
        world_size=run.world_size,
        sampling=cfg.data.sampling,
        class_weights=class_weights(cfg.optim.class_weights, split.labels, len(split.class_names)),
        exchange=None if placement.where == "device" else run.exchange,
        mixes=cfg.augment.mixes,
    )
