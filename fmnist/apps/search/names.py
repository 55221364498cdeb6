"""How a query names an image, and what can be searched in; no torch is imported."""

import re

from fmnist.runtime.arguments import existing

SOURCES = ("train", "val", "test", "all")
QUERY = re.compile(r"(train|val|test):([0-9]{1,9})")


def picture(text: str) -> str:
    """Read split:number or the path of a picture, for add_argument's `type`."""
    return text if QUERY.fullmatch(text) else str(existing(text))
