"""Pictures from outside come back as Fashion-MNIST would show them; bad files come back as errors."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmnist.apps.cutout import cut_out, find_object, fit
from fmnist.apps.views import read_photo
from fmnist.data.fashion_mnist import INFO
from fmnist.data.photos import WORK_SIZE, find_pictures, open_picture, to_rgb
from fmnist.data.split import Split

PAPER = (228, 224, 216)


def drawn(image: np.ndarray, noise: float = 4.0, paper: tuple[int, int, int] = PAPER) -> Image.Image:
    """Draw a 28 x 28 picture dark on light: 600 px, 420 of them the picture, light from one side, noise."""
    big = np.asarray(Image.fromarray(image).resize((420, 420), Image.Resampling.NEAREST), dtype=np.float64)
    pixels = np.tile(np.array(paper, dtype=np.float64), (600, 600, 1))
    pixels[100:520, 70:490] *= 1 - big[..., None] / 255
    pixels *= np.linspace(0.96, 1.04, 600)[None, :, None]
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def block(size: tuple[int, int], box: tuple[int, int, int, int], paper: object, ink: object) -> Image.Image:
    """A rectangle on paper."""
    image = Image.new("RGB", size, paper)  # type: ignore[arg-type]
    image.paste(ink, box)  # type: ignore[arg-type]
    return image


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 85}), ("png", {}), ("webp", {"quality": 90})])
def test_a_real_image_drawn_dark_on_light_comes_back(
    tmp_path: Path, train_images: Split, suffix: str, options: dict[str, int]
) -> None:
    differences = []
    for index in range(6):
        original = train_images.images[index].numpy()
        drawn(original).save(tmp_path / f"{index}.{suffix}", **options)
        photo = read_photo(str(tmp_path / f"{index}.{suffix}"), INFO)
        assert photo.error == "" and photo.cutout is not None
        assert photo.cutout.inverted and photo.cutout.box is not None
        differences.append(np.abs(photo.cutout.view.astype(int) - original).mean())
    # Of 255; an image moved by one pixel differs from itself by 20 or more.
    assert np.median(differences) < 8 and max(differences) < 25, differences


def test_exif_rotation_is_undone(tmp_path: Path, train_images: Split) -> None:
    upright = drawn(train_images.images[0].numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer turns it by 90 degrees clockwise
    for name, picture, tags in (
        ("a.jpg", upright, None),
        ("b.jpg", upright.transpose(Image.Transpose.ROTATE_90), exif),
    ):
        picture.save(tmp_path / name, quality=95, **({"exif": tags} if tags else {}))
    first, second = (read_photo(str(tmp_path / name), INFO).cutout for name in ("a.jpg", "b.jpg"))
    assert first is not None and second is not None
    assert np.abs(first.view.astype(int) - second.view).mean() < 3


def test_a_picture_of_the_data_set_comes_back_unchanged(tmp_path: Path, train_images: Split) -> None:
    for index in range(20):
        image = train_images.images[index].numpy()
        for name, pixels in (("light", image), ("dark", 255 - image)):
            Image.fromarray(pixels).save(tmp_path / f"{name}.png")
            cutout = read_photo(str(tmp_path / f"{name}.png"), INFO).cutout
            assert cutout is not None and np.array_equal(cutout.view, image), (index, name)


def test_inversion_follows_the_background_or_the_option() -> None:
    dark_on_light = block((100, 100), (30, 20, 60, 80), PAPER, (20, 30, 90))
    light_on_dark = block((100, 100), (30, 20, 60, 80), (30, 30, 30), (250, 240, 60))
    for pixels, inverted in ((dark_on_light, True), (light_on_dark, False)):
        found = cut_out(pixels)
        assert found.inverted is inverted and found.box == (30, 20, 60, 80)
        # 60 x 30 becomes 28 x 14, with 7 columns of padding on each side.
        assert found.view[:, 7:21].min() > 150 and found.view[:, :7].max() == found.view[:, 21:].max() == 0
    assert cut_out(dark_on_light, invert="never").view.max() < 30  # nothing of it is lighter than the paper
    whole = cut_out(dark_on_light, crop=False)
    assert whole.box is None and whole.inverted and whole.view[0, 0] < 40 < 150 < whole.view[14, 12]


def test_the_largest_object_is_kept_and_its_parts_are_one() -> None:
    image = block((200, 200), (60, 40, 140, 95), PAPER, (20, 20, 60))
    image.paste((20, 20, 60), (60, 99, 140, 160))  # a belt of 4 pixels of paper between
    image.paste((200, 20, 20), (5, 180, 25, 195))  # a label in the corner
    found = find_object(image)
    assert found is not None
    rows, columns = np.nonzero(found[1])
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (60, 40, 140, 160)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3), (28, 28), (300, 200)])
@pytest.mark.parametrize("crop", [True, False])
def test_one_plain_colour_holds_no_object(size: tuple[int, int], crop: bool) -> None:
    with pytest.raises(ValueError, match="one plain colour"):
        cut_out(Image.new("RGB", size, PAPER), crop=crop)


def test_without_a_plain_background_the_picture_is_taken_whole() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    assert cut_out(Image.fromarray(pixels)).box is None


def test_padding_is_that_of_the_data_set() -> None:
    # 28 x 13 leaves 15 columns: 8 on the left, 7 on the right, as 99.7 % of the training images with an odd padding.
    columns = np.flatnonzero(fit(np.full((56, 26), 200, dtype=np.float32)).any(0))
    assert (columns.min(), columns.max()) == (8, 20)


def test_transparency_is_the_background(tmp_path: Path) -> None:
    for ink, inverted in (((20, 30, 90, 255), True), ((250, 250, 250, 255), False)):  # white would vanish on white
        image = Image.new("RGBA", (300, 200), (0, 255, 0, 0))
        image.paste(ink, (100, 50, 180, 170))
        for name in ("cut.png", "cut.webp"):
            image.save(tmp_path / name, lossless=True)
            cutout = read_photo(str(tmp_path / name), INFO).cutout
            assert cutout is not None and cutout.inverted is inverted
            assert cutout.view[14, 14] > 200 and cutout.view[14, 0] == 0
    Image.new("RGBA", (30, 30), (9, 9, 9, 0)).save(tmp_path / "nothing.png")
    assert "one plain colour" in read_photo(str(tmp_path / "nothing.png"), INFO).error


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "I;16", "CMYK"])
def test_every_mode_is_read(tmp_path: Path, mode: str) -> None:
    rgb = block((300, 300), (100, 80, 200, 220), "white", "black")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    else:
        image = rgb.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    cutout = read_photo(str(path), INFO).cutout
    assert cutout is not None and cutout.inverted and cutout.view[14, 14] > 200, mode


@pytest.mark.parametrize("top", [255, 4096, 65535])
def test_sixteen_bits_keep_their_levels(top: int) -> None:
    values = np.linspace(0, top, 4096).reshape(64, 64).astype(np.uint16)
    white = 255 if top == 255 else 65535
    found = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert np.abs(found - values * (255 / white)).max() <= 1


@pytest.mark.parametrize("top", [256, 1023, 4095])
def test_ten_bits_in_sixteen_are_refused_and_not_shown_black(tmp_path: Path, top: int) -> None:
    values = np.linspace(0, top, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "dark.png")
    said = f"its values end at {top} of 65,535, which 8 bits would show as black: stretch them"
    assert said in read_photo(str(tmp_path / "dark.png"), INFO).error


@pytest.mark.parametrize("top", [1.0001, 3.0])
def test_floats_a_little_above_1_are_refused_and_not_shown_black(tmp_path: Path, top: float) -> None:
    values = np.linspace(0, top, 4096).reshape(64, 64).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "sharpened.tiff")
    said = f"its values end at {top:g}, neither at 1 nor at 255"
    assert said in read_photo(str(tmp_path / "sharpened.tiff"), INFO).error
    assert np.asarray(to_rgb(Image.fromarray(values / top)))[..., 0].max() == 255


def test_a_large_photo_is_worked_on_small(tmp_path: Path) -> None:
    block((4000, 3000), (1500, 900, 2500, 2100), PAPER, (30, 60, 120)).save(tmp_path / "large.jpg")
    image = open_picture(tmp_path / "large.jpg")
    assert image.size == (WORK_SIZE, WORK_SIZE * 3 // 4)


def test_bad_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        photo = read_photo(str(tmp_path / name), INFO)
        assert photo.cutout is None and photo.error and "\n" not in photo.error, name
        return photo.error

    picture = block((300, 300), (100, 80, 200, 220), "white", "navy")
    picture.save(tmp_path / "whole.jpg")
    picture.save(tmp_path / "whole.png")
    assert error("absent.jpg") == "no such file"
    assert error("empty.jpg", b"") == "an empty file"
    assert error("text.jpg", b"not a picture\n" * 20) == "not a JPEG, PNG, WEBP, GIF, BMP or TIFF picture"
    assert "truncated" in error("half.jpg", (tmp_path / "whole.jpg").read_bytes()[:1500])
    error("half.png", (tmp_path / "whole.png").read_bytes()[:400])
    picture.save(tmp_path / "other.ppm")  # a decoder that stays closed
    assert error("other.ppm") == "not a JPEG, PNG, WEBP, GIF, BMP or TIFF picture"
    (tmp_path / "folder.png").mkdir()
    assert error("folder.png") == "a folder"
    os.mkfifo(tmp_path / "pipe.png")  # would block for ever if it were opened
    assert error("pipe.png") == "not a regular file"
    (tmp_path / "loop.png").symlink_to("loop.png")
    error("loop.png")
    Image.new("RGB", (60, 60), "white").save(tmp_path / "blank.png")
    assert "one plain colour" in error("blank.png")

    # A bomb: 60,000 x 60,000 pixels in a few bytes; nothing of it may be unpacked.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    assert "pixels" in error("bomb.png", b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""))
    # Between Pillow's limit and twice it Pillow only warns.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert "more than 50,000 pixels" in error("whole.png")


def test_damaged_bytes_never_raise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        block((80, 80), (20, 20, 60, 60), "white", "navy").save(path)
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for position in rng.integers(0, len(content), 4):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(damaged)
            photo = read_photo(str(path), INFO)
            assert (photo.cutout is None) == bool(photo.error)


def test_files_folders_and_globs_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.JPG", "sub/b.png", "sub/deep/c.webp", "sub/notes.txt", "sub/.hidden.png", "d[1].jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    Path("nothing").mkdir()
    Path("sub/deep/up").symlink_to(tmp_path)  # a loop
    assert list(find_pictures(["sub"])) == [("sub/b.png", ""), ("sub/deep/c.webp", "")]
    assert list(find_pictures(["d[1].jpg", "sub/notes.txt"])) == [("d[1].jpg", ""), ("sub/notes.txt", "")]
    assert list(find_pictures(["**/*.webp", "sub"])) == [("sub/deep/c.webp", ""), ("sub/b.png", "")]
    bad = dict(find_pictures(["nothing", "absent.png", "*.gif"]))
    assert "without pictures" in bad["nothing"] and "no such" in bad["absent.png"] and "no file" in bad["*.gif"]


def test_views_are_what_the_model_takes(train_images: Split) -> None:
    view = cut_out(drawn(train_images.images[1].numpy())).view
    assert torch.from_numpy(view).shape == (28, 28) and view.dtype == np.uint8
