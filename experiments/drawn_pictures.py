"""Make pictures that are not Fashion-MNIST, sorted by class, and score predictions on them.

Drawings of clothes from two packages of Debian, laid on paper or cloth, lit from one side and photographed with noise
as JPEG, or left as a cut-out (PNG, WebP): the emoji of fonts-noto-color-emoji (SIL Open Font License) and, with
rsvg-convert, the clip art of openclipart-svg (public domain). The folder `none` holds other things: emoji,
scikit-learn (two photos, six digits) and matplotlib (a portrait).

    apt-get install fonts-noto-color-emoji openclipart-svg librsvg2-bin
    python -m experiments.drawn_pictures make pictures
    python -m fmnist predict runs/cnn pictures --output predictions
    python -m experiments.drawn_pictures score predictions/predictions.csv
"""

import argparse
import csv
import io
import subprocess
from pathlib import Path

import numpy as np
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits, load_sample_images

from fmnist.data.fashion_mnist import CLASS_NAMES

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLIP_ART = Path("/usr/share/openclipart/svg/people/clothing")
BITMAP = 109  # the only size of the font's bitmaps
# (class, name, code point)
EMOJI = (
    ("T-shirt/top", "t_shirt", 0x1F455),
    ("T-shirt/top", "running_shirt", 0x1F3BD),
    ("Trouser", "jeans", 0x1F456),
    ("Dress", "dress", 0x1F457),
    ("Coat", "coat", 0x1F9E5),
    ("Coat", "lab_coat", 0x1F97C),
    ("Sandal", "sandal", 0x1F461),
    ("Sandal", "high_heel", 0x1F460),
    ("Shirt", "blouse", 0x1F45A),
    ("Sneaker", "running_shoe", 0x1F45F),
    ("Sneaker", "brown_shoe", 0x1F45E),
    ("Bag", "handbag", 0x1F45C),
    ("Bag", "purse", 0x1F45B),
    ("Bag", "clutch", 0x1F45D),
    ("Ankle boot", "boot", 0x1F462),
    ("Ankle boot", "hiking_boot", 0x1F97E),
    ("none", "hat", 0x1F452),
    ("none", "glasses", 0x1F453),
    ("none", "banana", 0x1F34C),
    ("none", "car", 0x1F697),
    ("none", "cat", 0x1F408),
    ("none", "guitar", 0x1F3B8),
)
DRAWINGS = (
    ("T-shirt/top", "t-shirt_01"),
    ("T-shirt/top", "t-shirt_02"),
    ("T-shirt/top", "t-shirt_03"),
    ("Shirt", "camicia_in_seta_architet_01"),
    ("Sneaker", "tennis_shoe_jarno_vasama_"),
    ("Ankle boot", "hiking_boot_jarno_vasama_"),
    ("Bag", "straw_tote_linda_kim_01"),
    ("none", "green_fedora_01"),
)
PAPERS = ((238, 236, 230), (250, 250, 250), (205, 214, 222), (40, 42, 48))


def emoji(code: int) -> Image.Image:
    """Draw one emoji as RGBA, 4 times the font's size."""
    font = ImageFont.truetype(str(FONT), BITMAP)
    image = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
    return image.resize((544, 512), Image.Resampling.LANCZOS)


def drawing(name: str) -> Image.Image | None:
    """Draw one clip art as RGBA, 512 px on its longest edge; None where it or rsvg-convert is not installed."""
    found = sorted(CLIP_ART.rglob(f"{name}.svg"))
    if not found:
        return None
    try:
        command = ["rsvg-convert", "-w", "512", "-h", "512", "-a", str(found[0])]
        done = subprocess.run(command, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return Image.open(io.BytesIO(done.stdout)).convert("RGBA")


def photograph(item: Image.Image, paper: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """Lay a cut-out on paper with a soft shadow, light from one side, and a camera's noise: 1200 x 900 RGB."""
    scene = Image.new("RGBA", (1200, 900), (*paper, 255))
    item = item.rotate(float(rng.uniform(-6, 6)), Image.Resampling.BICUBIC, expand=True)
    at = (int(rng.integers(80, 1120 - item.width)), int(rng.integers(60, 840 - item.height)))
    shadow = Image.new("RGBA", scene.size)
    shadow.paste((0, 0, 0, 50), (at[0] + 6, at[1] + 8), item.getchannel("A"))
    scene = Image.alpha_composite(scene, shadow.filter(ImageFilter.GaussianBlur(10)))
    scene.alpha_composite(item, at)
    pixels = np.asarray(scene.convert("RGB"), dtype=np.float32)
    light = np.linspace(0.9, 1.03, 1200, dtype=np.float32)[None, :, None]
    pixels = pixels * light + rng.normal(0, 4, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(folder: Path) -> int:
    """Write the pictures; return how many."""
    if not FONT.is_file():
        raise SystemExit(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    rng = np.random.default_rng(0)
    items = [(label, f"emoji_{name}", emoji(code)) for label, name, code in EMOJI]
    items += [(label, f"clipart_{name}", image) for label, name in DRAWINGS if (image := drawing(name)) is not None]
    for number, (label, name, image) in enumerate(items):
        place = folder / label.replace("/", "_").replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        if number % 5 == 4:
            image.save(place / (f"{name}.png" if number % 2 else f"{name}.webp"))
            continue
        photo = photograph(image, PAPERS[number % 5], rng)
        exif = Image.Exif()
        if number % 5 == 1:  # held upright: the sensor's rows are the scene's columns, and EXIF says so
            photo = photo.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6
        photo.save(place / f"{name}.jpg", quality=88, exif=exif)
    place = folder / "none"
    samples = load_sample_images()
    for file, pixels in zip(samples.filenames, samples.images, strict=True):
        Image.fromarray(pixels).save(place / f"photo_{Path(file).name}")
    portrait = Image.open(cbook.get_sample_data("grace_hopper.jpg"))
    portrait.save(place / "photo_grace_hopper.jpg")
    digits = load_digits().images
    for index in range(6):
        paper = Image.fromarray((255 - digits[index] * 15.9).astype(np.uint8)).resize(
            (320, 320), Image.Resampling.BICUBIC
        )
        paper.save(place / f"digit_{index}.png")
    return len(items) + len(samples.images) + 1 + 6


def score(path: Path) -> None:
    """Print how many pictures of each kind were predicted right, in the top three, and flagged as unfamiliar."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    classes = {name.replace("/", "_").replace(" ", "_"): name for name in CLASS_NAMES}
    for title, kind in (("clothing", True), ("non-clothing", False)):
        part = [row for row in rows if (Path(row["file"]).parent.name in classes) == kind]
        flagged = sum(row["unfamiliar"] == "yes" for row in part)
        text = f"{title}: {len(part)} pictures, {flagged} flagged as unfamiliar"
        if kind:
            names = [classes[Path(row["file"]).parent.name] for row in part]
            right = [row["prediction"] == name for row, name in zip(part, names, strict=True)]
            three = [name in (row["top1"], row["top2"], row["top3"]) for row, name in zip(part, names, strict=True)]
            kept = [hit for hit, row in zip(right, part, strict=True) if row["unfamiliar"] == "no"]
            text += (
                f"; {sum(right)} right, {sum(three)} in the top three; {sum(kept)} right of the {len(kept)} not flagged"
            )
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "score"))
    parser.add_argument("path", type=Path, help="make: the folder to fill; score: the predictions.csv")
    args = parser.parse_args()
    if args.what == "make":
        print(f"{make(args.path)} pictures in {args.path}")
    else:
        score(args.path)


if __name__ == "__main__":
    main()
