"""How a query names an image, and what can be searched in; no torch is imported."""

import re
from collections import Counter
from collections.abc import Sequence

from fmnist.data.photos import find_pictures

SOURCES = ("train", "val", "test", "all")
QUERY = re.compile(r"(train|val|test):([0-9]{1,9})")  # the split, and the position in the data set's own file


def find_queries(images: Sequence[str]) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Find what a query names: images of a split, pictures, folders, globs.

    Returns:
        Names, each with its error or an empty text; what was found beside pictures, by suffix.

    Raises:
        ValueError: there is no picture at all; one line.
    """
    left_out = Counter[str]()
    named = [
        pair for name in images for pair in ([(name, "")] if QUERY.fullmatch(name) else find_pictures([name], left_out))
    ]
    if all(error for _, error in named):
        raise ValueError("; ".join(f"{name}: {error}" for name, error in named[:3]))
    return named, left_out
