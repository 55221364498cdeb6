"""The features of a split under given weights: computed once, and kept beside the run."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fmnist.runtime.files import write_atomic
from fmnist.runtime.processes import ALONE, Processes
from fmnist.trained import Trained

logger = logging.getLogger("fmnist")
FORMAT = "2"  # 1 had no lengths
CHUNK = 2000  # images between two moves of the progress bar


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a model makes of N images; on the CPU.

    Attributes:
        features: float16 [N, D], penultimate features, each scaled to length 1.
        lengths: float32 [N], what they were divided by.
        logits: float32 [N, num_classes].
    """

    features: Tensor
    lengths: Tensor
    logits: Tensor

    @property
    def unscaled(self) -> Tensor:
        """The features as the model gave them, but for the rounding of float16; float32 [N, D]."""
        return self.features.float() * self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, indices: Tensor) -> "Features":
        """Return those of some images, int64 [M]."""
        return Features(features=self.features[indices], lengths=self.lengths[indices], logits=self.logits[indices])


def unit(features: Tensor) -> Tensor:
    """Scale each row to length 1, in float32."""
    return F.normalize(features.float(), dim=1)


def features_of(trained: Trained, name: str, images: Tensor, processes: Processes = ALONE) -> Features:
    """Return the features of images: those kept for these very weights and images, else computed and kept.

    Args:
        trained: the run or checkpoint.
        name: of the file in its folder `features`, e.g. the split's.
        images: uint8 [N, H, W] or [N, 3, H, W].
        processes: each computes its share, and the main one keeps them.

    Raises:
        ValueError: a feature is not finite, or the folder is a link out of the run directory.
    """
    processes.together(lambda: _file(trained, name) if processes.is_main else None)  # refused on all, before the work
    kept = processes.on_main(kept_features, trained, name, images)
    known = any(processes.gather(kept is not None))
    starts = [] if known else processes.share(range(0, len(images), CHUNK))  # whole chunks: the bits of one process
    share = images[starts[0] : starts[-1] + CHUNK] if starts else images[:0]
    mine = processes.together(lambda: compute_features(trained, share) if kept is None else kept)
    found = Features(**{key: processes.gather_rows(tensor.contiguous()) for key, tensor in vars(mine).items()})
    if not known:
        processes.on_main(_keep, trained, name, images, found)
    return found


def _keep(trained: Trained, name: str, images: Tensor, found: Features) -> None:
    path = _file(trained, name)
    try:
        write_atomic(path, save(vars(found), metadata=_key(trained, images)))
    except OSError as error:  # a run that may not be written to is used all the same
        logger.warning("%s is not kept (%s): it is computed again next time", path, error.strerror)


def kept_features(trained: Trained, name: str, images: Tensor) -> Features | None:
    """Return what `features_of` kept for these very weights and images; None where nothing valid is kept."""
    try:
        with safe_open(_file(trained, name), framework="pt") as file:
            if file.metadata() != _key(trained, images):
                return None
            # Copied: a mapped file that shrinks would end the process.
            found = Features(**{key: file.get_tensor(key).clone() for key in ("features", "lengths", "logits")})
    except (OSError, SafetensorError, ValueError):
        return None
    fits = found.features.ndim == 2 and found.logits.shape == (len(images), trained.augment.num_classes)
    whole = all(len(tensor) == len(images) and tensor.isfinite().all() for tensor in vars(found).values())
    return found if fits and whole else None


def compute_features(trained: Trained, images: Tensor) -> Features:
    """Run the model over images, uint8 [N, H, W] or [N, 3, H, W]; on a terminal with a progress bar.

    Raises:
        ValueError: a feature is not finite.
    """
    found = []
    parts = images.split(CHUNK) if len(images) else ()  # nothing is split into one part of nothing
    for part in tqdm(parts, desc="features", unit_scale=CHUNK, unit="image", disable=None, leave=False):
        found.append(_scaled(*trained(part)))
    if not found:
        return _scaled(*trained(images))
    whole = Features(**{key: torch.cat([vars(part)[key] for part in found]) for key in vars(found[0])})
    if not (whole.features.isfinite().all() and whole.lengths.isfinite().all()):
        raise ValueError(f"{trained.weights} gives features that are not finite")
    return whole


def _scaled(logits: Tensor, features: Tensor) -> Features:
    return Features(features=unit(features).half(), lengths=features.float().norm(dim=1), logits=logits)


def _file(trained: Trained, name: str) -> Path:
    return trained.folder("features") / f"{name}.safetensors"


def _key(trained: Trained, images: Tensor) -> dict[str, str]:
    digest, size = images_sha256(images), str(trained.size)
    return {"format": FORMAT, "weights_sha256": trained.digest, "images_sha256": digest, "size": size}


def images_sha256(images: Tensor) -> str:
    """Return the sha256 of the pixels of images, uint8 [N, H, W] or [N, 3, H, W] on the CPU."""
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
