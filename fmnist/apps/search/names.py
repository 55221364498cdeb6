"""How a query names an image, and what can be searched in; no torch is imported."""

import re
from collections import Counter
from collections.abc import Iterable

from fmnist.data.photos import find_pictures

SOURCES = ("train", "val", "test", "all")
QUERY = re.compile(r"(train|val|test):([0-9]{1,9})")  # the split, and the position in the data set's own file


def find_queries(images: Iterable[str], left_out: Counter[str]) -> list[tuple[str, str]]:
    """Return `split:index` and the pictures that files, folders and globs name, with an error or none for each.

    Raises:
        ValueError: none of them is there.
    """
    found: list[tuple[str, str]] = []
    for name in images:
        found += [(name, "")] if QUERY.fullmatch(name) else find_pictures([name], left_out)
    if all(error for _, error in found):
        raise ValueError("; ".join(f"{name}: {error}" for name, error in found[:3]))
    return found
