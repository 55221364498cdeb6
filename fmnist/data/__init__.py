"""The data path: find or fetch a data set, keep a split on the device, augment it there.

In somebody else's loop: `fmnist.data.load("fashion_mnist", "train").batches(256, epoch=0, flip=0.5)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmnist.data.image_set import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is used: some command lines look for files alone."""
    if name == "load":
        from fmnist.data.image_set import load

        return load
    raise AttributeError(f"module 'fmnist.data' has no attribute {name!r}")
