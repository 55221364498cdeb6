"""What commands after training have to know of a data set: kept beside the run, so that they need no images."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fmnist.runtime.files import read_json

SplitName = Literal["train", "val", "test"]
DATA_FILE = "data.json"


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A data set without its images.

    Attributes:
        name: as `data.name` names it.
        title: for headings, e.g. Fashion-MNIST, or the name of a folder.
        class_names: in label order.
        mean, std: per channel of the stored images, over the published training images, in [0, 1].
        shape: channels, height and width of a stored image, pixels.
        num_train, num_val: images to train on, and held out for validation.
        num_test: images of its test; None where it is not known.
        source, licence: where it comes from, and under which terms; empty where nothing is known.
        fit: how a picture from outside takes the stored shape; see `data.fit`.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    num_train: int
    num_val: int = 0
    num_test: int | None = None
    source: str = ""
    licence: str = ""
    fit: str = "crop"

    def __post_init__(self) -> None:
        channels = len(self.mean)
        if channels not in (1, 3) or len(self.std) != channels or self.shape[0] != channels or not self.class_names:
            raise ValueError(
                f"{channels} means, {len(self.std)} standard deviations, shape {self.shape} and "
                f"{len(self.class_names)} classes; expected one each for 1 or 3 channels, and a class"
            )

    @property
    def is_fashion_mnist(self) -> bool:
        """Whether what is known of Fashion-MNIST alone holds: its cut-out of pictures, its human line, its paper."""
        return self.name == "fashion_mnist"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of a stored image as a tensor: [H, W], or [3, H, W] where there are colours."""
        return self.shape if self.shape[0] > 1 else self.shape[1:]

    def to_json(self) -> dict[str, Any]:
        """Return what `read_info` reads back from a file of JSON."""
        return asdict(self)


def mean_and_std(count: int, total: int, squares: int) -> tuple[float, float]:
    """Return mean and standard deviation in [0, 1], to four digits, of pixels from 0 to 255; of one value 1.

    Args:
        count, total, squares: of the pixels: how many, their sum, the sum of their squares; exact.
    """
    std = round(math.sqrt(count * squares - total * total) / count / 255, 4)
    return round(total / count / 255, 4), std or 1.0


def read_info(directory: Path) -> DataInfo:
    """Read what a run directory keeps of its data set.

    Args:
        directory: of the run, or of an export.

    Raises:
        ValueError: the file is missing, or is not what a run writes.
    """
    path = directory / DATA_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing: it names the classes of the run")
    content = read_json(path)
    try:
        return info_from_json(content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by a run: {str(error)[:200]}") from None


def info_from_json(content: Mapping[str, Any]) -> DataInfo:
    """Return what `DataInfo.to_json` was made of.

    Raises:
        TypeError, ValueError: it is something else.
    """
    values = {item.name: content[item.name] for item in fields(DataInfo) if item.name in content}
    for name, kind in (("class_names", str), ("mean", float), ("std", float), ("shape", int)):
        if not isinstance(values.get(name), list) or any(type(value) is not kind for value in values[name]):
            raise ValueError(f"{name} is {values.get(name)!r:.80}")
        values[name] = tuple(values[name])
    if len(values["shape"]) != 3 or any(not 0 < std < float("inf") for std in values["std"]):
        raise ValueError(f"shape {values['shape']}, std {values['std']}")
    return DataInfo(**values)
