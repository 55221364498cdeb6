"""What the processes of a run read at its start: each its rows, where the file allows it, and nothing twice."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_spread import ranks
from test_spread_evaluation import on_ranks

from fmnist.config.schema import DataConfig
from fmnist.data.mapped import Mapped, digest_of
from fmnist.data.placement import Placement, place
from fmnist.data.registry import open_source
from fmnist.data.sources.arrays import statistics
from fmnist.data.sources.npz_file import read_arrays
from fmnist.data.split import Split
from fmnist.runtime.processes import Processes, SaidByAll

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (50, 9, 12, 3), np.uint8)
LABELS = np.arange(50) % 4


def npz(path: Path, save: Any = np.savez, **changes: Any) -> Path:
    arrays = {"train_images": COLOUR, "train_labels": LABELS, "test_images": COLOUR[:7], "test_labels": LABELS[:7]}
    save(path / "set.npz", **arrays | changes)
    return path / "set.npz"


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_statistics_are_summed_over_shares(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.setattr("fmnist.data.sources.arrays.CHUNK", 8)  # 50 images: 7 parts
    images = torch.from_numpy(COLOUR).movedim(-1, 1)
    mapped, seen = Mapped(array=images, at=torch.arange(50)), list[int]()
    read = Mapped.read
    monkeypatch.setattr(Mapped, "read", lambda self, rows: seen.extend(rows) or read(self, rows))
    exact = images.double() / 255
    mean, std = (tuple(round(float(x), 4) for x in (f((0, 2, 3)))) for f in (exact.mean, lambda d: exact.std(d, False)))
    assert statistics(images.contiguous()) == (mean, std)
    assert on_ranks(world_size, lambda rank: statistics(mapped, rank)) == [(mean, std)] * world_size
    assert sorted(seen) == list(range(50))  # each image once, on whatever process


def test_one_colour_is_refused_though_every_share_knows_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmnist.data.sources.arrays.CHUNK", 8)
    images = torch.zeros(16, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one and the same colour"):
        on_ranks(2, lambda rank: statistics(images, rank))
    images[8:] = 255  # one colour in each share
    assert on_ranks(2, lambda rank: statistics(images, rank)) == [((0.5,), (0.5,))] * 2


def test_images_of_other_shapes_on_another_rank_are_named() -> None:
    images = torch.from_numpy(COLOUR).movedim(-1, 1)
    for other in (images[:, 0], images[:40]):
        with pytest.raises(ValueError, match=r"rank 1 sees training images \[.*\], rank 0 \[50, 3, 9, 12\]: all proc"):
            on_ranks(2, lambda rank: statistics(other if rank.rank else images, rank))  # noqa: B023


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_failure_around_what_is_done_together_is_everybodys(failing: int, when: str) -> None:
    def fails(rank: Processes, at: str) -> int:
        if at == when and rank.rank == failing:
            raise ValueError(f"planted {at}")
        return rank.rank

    def work(rank: Processes) -> str:
        def outer() -> list[int]:
            fails(rank, "before")
            found = rank.gather(rank.together(lambda: fails(rank, "within")))
            fails(rank, "after")
            return found

        with pytest.raises(SaidByAll) as caught:
            rank.together(outer)
        assert rank.gather(rank.rank) == [0, 1]  # they still speak of the same thing
        return str(caught.value)

    assert on_ranks(2, work) == [f"planted {when}"] * 2


@pytest.mark.parametrize("images", [COLOUR, COLOUR[..., :1], COLOUR[..., 0]])
def test_arrays_that_are_not_compressed_stay_in_the_file(images: np.ndarray, tmp_path: Path) -> None:
    path = npz(tmp_path, train_images=images, test_images=images[:7])
    arrays, others = read_arrays(str(path), ("train_images", "train_labels"), in_place=True)
    assert others == ["test_images", "test_labels"]  # which are not even read
    assert isinstance(arrays["train_images"], np.memmap) and not isinstance(arrays["train_labels"], np.memmap)
    assert all(np.array_equal(arrays[name], np.load(path)[name]) for name in ("train_images", "train_labels"))
    cfg = DataConfig(name="npz", root=str(path), val_size=12)
    source, one = open_source(cfg, processes=Processes(0, 1)), open_source(cfg)
    assert source.info == one.info
    for name in ("train", "val", "test"):
        split, whole = Split.load(name, source, read=False), Split.load(name, one)  # type: ignore[arg-type]
        assert split.unread is not None and whole.unread is None
        assert split.digest == whole.digest == digest_of(whole.images, whole.labels)
        assert split.images.shape == whole.images.shape and torch.equal(split.at_rows(None), whole.images)
        assert split.at_rows(None).is_contiguous()
        assert torch.equal(split.at_rows(range(1, 7, 2)), whole.images[1:7:2])


def test_others_are_read(tmp_path: Path) -> None:
    for save, images in ((np.savez_compressed, COLOUR), (np.savez, np.asfortranarray(COLOUR)), (np.savez, COLOUR[:0])):
        arrays, _ = read_arrays(str(npz(tmp_path, save, train_images=images)), ["train_images"], in_place=True)
        assert not isinstance(arrays["train_images"], np.memmap) and np.array_equal(arrays["train_images"], images)


def test_a_damaged_file_is_the_same_line_however_it_is_opened(tmp_path: Path) -> None:
    path = npz(tmp_path)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("train_images.npy").header_offset
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\1\2")  # the first of the members, in the archive's directory
    # a pixel, the array's header, its brackets, the member's header, its name; in the directory its packed size
    for change, flip in ((3000, 1), (75, 1), (126, 32), (142, 32), (1, 1), (33, 1), (listed - at + 20, 128)):
        path.write_bytes(bytes(b ^ (number == at + change) * flip for number, b in enumerate(content)))
        said = []
        for processes in (None, Processes(0, 1)):
            with pytest.raises(ValueError, match="is no .npz file of plain arrays") as caught:
                open_source(DataConfig(name="npz", root=str(path), val_size=12), processes=processes)
            said.append(str(caught.value))
        assert said[0] == said[1]


@pytest.mark.parametrize("where", ["device", "spread", "host"])
def test_what_a_run_has_taken_from_a_users_file_may_be_overwritten(tmp_path: Path, where: Any) -> None:
    path = npz(tmp_path)
    cfg = DataConfig(name="npz", root=str(path), val_size=12)
    whole = {name: Split.load(name, cfg).images for name in ("train", "val", "test")}  # type: ignore[arg-type]
    for processes in ranks(2):
        source = open_source(cfg, processes=Processes(0, 1))
        splits = {name: Split.load(name, source, read=False) for name in ("train", "val", "test")}  # type: ignore[arg-type]
        placed = place(splits, Placement(where=where, num_bytes=0, world_size=2), processes, CPU, 5)
        processes.exchange.close()
        with path.open("r+b") as file:  # in place, as a careless program does
            content = file.read()
            file.seek(0)
            file.write(bytes(len(content)))
        for name, split in placed.items():
            assert split.unread is None
            rows = slice(None) if split.rows is None else list(split.rows)
            assert torch.equal(split.images, whole[name][rows])
        path.write_bytes(content)
