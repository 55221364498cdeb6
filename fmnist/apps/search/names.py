"""How a query names an image, and what can be searched in; no torch is imported."""

import re

SOURCES = ("train", "val", "test", "all")
QUERY = re.compile(r"(train|val|test):([0-9]{1,9})")  # the split, and the position in the data set's own file
