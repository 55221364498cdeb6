"""Copy the Open Clip Art Library into folders by class: a colour data set of 7,700 pictures, some classes rare.

example: apt-get install openclipart-png && python -m experiments.clip_art data/clip_art

Its 18 largest named categories are the classes; a picture keeps its name behind its sub-category. Public domain.
"""

import argparse
import shutil
from pathlib import Path

LIBRARY = Path("/usr/share/openclipart/png")  # of the Debian package openclipart-png
LEFT_OUT = ("buttons", "logos", "special", "unsorted")  # the first two hold ten pictures, the others anything


def main(argv: list[str] | None = None) -> int:
    """Copy the pictures and print how many there are of each class."""
    parser = argparse.ArgumentParser(prog="experiments.clip_art", description=__doc__)
    parser.add_argument("folder", type=Path, help="to write, as FOLDER/CLASS/PICTURE.png")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{folder} is there already")
    if not LIBRARY.is_dir():
        parser.error(f"no {LIBRARY}: apt-get install openclipart-png")
    for category in sorted(path for path in LIBRARY.iterdir() if path.is_dir() and path.name not in LEFT_OUT):
        (folder / category.name).mkdir(parents=True)
        pictures = sorted(path for path in category.rglob("*.png") if path.is_file())
        for picture in pictures:
            shutil.copyfile(picture, folder / category.name / "_".join(picture.relative_to(category).parts))
        print(f"{len(pictures):6,} {category.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
