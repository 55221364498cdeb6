"""Order, slices and keys of batches: pure functions of (seed, epoch, step), whatever the process count."""

import threading

import pytest
import torch

from fmnist.data.batches import Loader, MicroBatch, draw_uniforms, epoch_generator, mix_key
from fmnist.data.split import Split
from fmnist.runtime.processes import Processes


def loaders(split: Split, world_size: int, micro: int, *, seed: int = 0, batch: int = 64) -> list[Loader]:
    return [
        Loader(split, global_batch_size=batch, micro_batch_size=micro, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def by_position(parts: list[MicroBatch]) -> list[tuple[tuple[int, int, int], list[int], list[int]]]:
    return sorted((part.key, part.indices.tolist(), part.partners.tolist()) for part in parts)


def test_an_epoch_takes_each_sample_at_most_once_and_drops_only_the_rest(train_images: Split) -> None:
    (loader,) = loaders(train_images, 1, 64)
    assert loader.steps_per_epoch == 31  # 2000 = 31 * 64 + 16
    seen = torch.cat([part.indices for step in range(31) for part in loader.micro_batches(step)])
    assert len(seen) == len(seen.unique()) == 31 * 64


@pytest.mark.parametrize("step", [0, 30, 31, 100])
def test_the_same_micro_batches_for_every_process_count(train_images: Split, step: int) -> None:
    # 1 process x 4, 2 x 2 and 4 x 1 micro-batches of 16 are one global batch of 64.
    cuts = [
        by_position([part for loader in loaders(train_images, world, 16) for part in loader.micro_batches(step)])
        for world in (1, 2, 4)
    ]
    assert cuts[0] == cuts[1] == cuts[2]
    assert [key[2] for key, _, _ in cuts[0]] == [0, 16, 32, 48]


def test_rank_r_of_accumulation_a_takes_micro_batch_a_times_w_plus_r(train_images: Split) -> None:
    second = loaders(train_images, 2, 16)[1]
    assert second.accumulation_steps == 2
    assert [part.key for part in second.micro_batches(5)] == [(0, 5, 16), (0, 5, 48)]


def test_any_batch_can_be_made_again_alone(train_images: Split) -> None:
    used, fresh = loaders(train_images, 1, 64)[0], loaders(train_images, 1, 64)[0]
    for step in range(70):
        (wanted,) = used.micro_batches(step)
    (again,) = fresh.micro_batches(69)
    assert torch.equal(wanted.indices, again.indices)
    assert torch.equal(wanted.uniforms, again.uniforms)
    assert again.epoch == 69 // 31 == 2


def test_epochs_and_seeds_differ_and_partners_mirror_the_global_batch(train_images: Split) -> None:
    loader, other = loaders(train_images, 1, 64)[0], loaders(train_images, 1, 64, seed=1)[0]
    first, second, seeded = (item.micro_batches(step)[0] for item, step in ((loader, 0), (loader, 31), (other, 0)))
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices, seeded.indices)
    assert not torch.equal(first.uniforms, second.uniforms)
    assert torch.equal(first.partners, first.indices.flip(0))


@pytest.mark.parametrize(
    ("batch", "micro", "world", "message"),
    [
        (64, 24, 1, "64 is not a multiple of micro_batch_size 24 x 1 process = 24"),
        (64, 32, 3, "64 is not a multiple of micro_batch_size 32 x 3 processes = 96"),
        (65, None, 2, "65 is not a multiple of micro_batch_size 32 x 2 processes = 64"),
        (2001, None, 1, "2001 but there are 2000 training images"),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error_with_the_numbers(
    train_images: Split, batch: int, micro: int | None, world: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(train_images, global_batch_size=batch, micro_batch_size=micro, seed=0, world_size=world)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 4, 5, 9_999, 10_000, 10_001])
def test_evaluation_shares_cover_every_image_once(num_images: int, world_size: int) -> None:
    shares = []
    for rank in range(world_size):
        one = Processes(0, 1)
        one.rank, one.world_size = rank, world_size
        shares += one.share(range(num_images))
    assert shares == list(range(num_images))


def test_keys_that_differ_in_one_bit_give_unrelated_seeds() -> None:
    # Random 63-bit numbers differ in 31.5 bits; the mean of 300 pairs deviates by sqrt(63) / 2 / sqrt(300) = 0.23.
    flips = [
        bin(mix_key(s, e, p) ^ mix_key(s, e, p ^ 1)).count("1") for s in range(10) for e in range(10) for p in range(3)
    ]
    assert abs(sum(flips) / len(flips) - 31.5) < 1.2
    assert len({mix_key(a, b) for a in range(100) for b in range(100)}) == 10_000


def test_a_new_augmentation_moves_no_draw_of_an_old_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = draw_uniforms(50, seed=3, epoch=2)
    count = before.shape[1]
    monkeypatch.setattr("fmnist.data.batches.NUM_UNIFORMS", count + 2)
    after = draw_uniforms(50, seed=3, epoch=2)
    assert after.shape == (50, count + 2) and torch.equal(after[:, :count], before)
    assert not torch.equal(after[:, -1], after[:, -2])
    assert not torch.equal(after[:, count:], draw_uniforms(50, seed=3, epoch=3)[:, count:])
    # The first fifteen are those of every run so far.
    drawn = torch.rand(50, 15, generator=epoch_generator(3, 2, 1))
    assert torch.equal(before[:, :15], drawn)


def test_the_next_epochs_tables_are_drawn_beside_the_steps_and_are_the_same(train_images: Split) -> None:
    plain = Loader(train_images, global_batch_size=500, seed=3)  # four steps an epoch
    ahead = Loader(train_images, global_batch_size=500, seed=3)
    drawn: list[tuple[int, bool]] = []
    real = ahead._draw

    def draw(epoch: int) -> object:
        drawn.append((epoch, threading.current_thread() is threading.main_thread()))
        return real(epoch)

    ahead._draw = draw
    for step in (0, 1, 2, 3, 4, 5, 8, 1, 5, 4):  # in order, then back and forth as a picture of an old batch asks
        wanted = plain.whole().micro_batches(step)[0]  # a loader of its own each time: drawn when it is asked for
        (found,) = ahead.micro_batches(step)
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.uniforms, wanted.uniforms)
    assert drawn[:3] == [(0, True), (1, False), (2, False)]  # only the first epoch's hold the main thread up
    assert (0, True) in drawn[3:] and len(drawn) <= 7
