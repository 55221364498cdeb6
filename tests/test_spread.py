"""Images that are spread over the processes, or lie in host memory: the bits of images on the device."""

import itertools
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, environment, train, warm_train
from forks import Forks, difference
from other_sets import write_npz
from PIL import Image
from test_exactness import PLAIN, make_config, recorded
from torch import Tensor
from warm import run_program

import fmnist.data.placement as placement
from fmnist.checkpoint.contents import read_state
from fmnist.checkpoint.store import Checkpoints
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig
from fmnist.data.augment import Augment
from fmnist.data.batches import Loader
from fmnist.data.placement import choose_place, place
from fmnist.data.split import Split
from fmnist.runtime.exchange import Exchange
from fmnist.runtime.processes import Processes
from fmnist.tracking.metrics_file import metric_name
from fmnist.training import plan

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(
    size=28, rotation=20, shift=0.1, scale=0.3, erase=0.5, mixup_alpha=0.4, cutmix_alpha=1.0, brightness=0.3
)


class Wire:
    """The all-to-all of several ranks that are threads of this process: each piece goes where its size says."""

    def __init__(self, world_size: int) -> None:
        self.met = threading.Barrier(world_size, timeout=60)
        self.sent: dict[int, tuple[Tensor, ...]] = {}
        self.lock, self.bytes = threading.Lock(), 0

    def all_to_all_single(
        self, out: Tensor, outgoing: Tensor, receives: list[int], sends: list[int], *, group: "Wire"
    ) -> None:
        rank = int(threading.current_thread().name.rpartition(" ")[2])
        self.sent[rank] = outgoing.clone().split(sends)
        self.met.wait()
        assert [len(self.sent[source][rank]) for source in sorted(self.sent)] == receives
        out.copy_(torch.cat([self.sent[source][rank] for source in sorted(self.sent)]))
        self.met.wait()


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the exchanges of so many ranks."""
    made: list[Exchange] = []

    def make(world_size: int) -> list[Exchange]:
        wire = Wire(world_size)
        monkeypatch.setattr(dist, "new_group", lambda **_: wire)
        monkeypatch.setattr(dist, "all_to_all_single", wire.all_to_all_single)
        ranks = [Exchange(rank, world_size) for rank in range(world_size)]
        for rank, exchange in enumerate(ranks):
            exchange._thread.name = f"exchange {rank}"
        made.extend(ranks)
        return ranks

    yield make
    for exchange in made:
        exchange.close()


def batches_of(loaders: list[Loader], augment: Augment, steps: range) -> dict[tuple[int, int, int], tuple[Tensor, ...]]:
    """What all ranks make of some steps, each rank in a thread of its own; by the key of the micro-batch."""
    found: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}

    def work(loader: Loader) -> None:
        own = Augment(augment.cfg, num_classes=10, mean=augment.mean, std=augment.std, fill=augment.fill, device=CPU)
        for step in steps:
            for batch in loader.micro_batches(step):
                images, targets = own(batch)
                found[batch.key] = (images.clone(), targets.clone())

    with ThreadPoolExecutor(len(loaders)) as ranks:
        list(ranks.map(work, loaders))
    return found


def spread(split: Split, exchanges: list[Exchange], **kinds: Any) -> list[Loader]:
    loaders = []
    for exchange in exchanges:
        rows = exchange.rows(len(split))
        held = replace(split, images=split.images[rows.start :: rows.step].clone(), rows=rows)
        loaders.append(Loader(held, rank=exchange.rank, world_size=exchange.world_size, exchange=exchange, **kinds))
    return loaders


def check_equal(found: dict[Any, tuple[Tensor, ...]], expected: dict[Any, tuple[Tensor, ...]]) -> None:
    assert found.keys() == expected.keys()
    for key, (images, targets) in expected.items():
        assert torch.equal(found[key][0], images) and torch.equal(found[key][1], targets), key


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batches_are_equal_byte_for_byte(train_images: Split, exchanges: Any, world_size: int) -> None:
    # 2,000 - 3 images, which neither 2, 3 nor 4 divides; 16 steps of 120 an epoch, so that steps 15 and 16 are of two.
    split = replace(train_images, images=train_images.images[3:], labels=train_images.labels[3:])
    kinds: dict[str, Any] = {"global_batch_size": 120, "micro_batch_size": 10, "seed": 7, "mixes": True}
    for cfg in (EVERYTHING, replace(EVERYTHING, size={0: 12, 1: 28}, backend="eager")):
        augment = Augment(cfg, num_classes=10, mean=(0.286,), std=(0.353,))
        expected = batches_of([Loader(split, **kinds)], augment, range(14, 18))
        assert len(expected) == 4 * 12
        check_equal(batches_of(spread(split, exchanges(world_size), **kinds), augment, range(14, 18)), expected)


@pytest.mark.parametrize("options", [{}, {"sampling": "balanced"}])
@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.3}, {"cutmix_alpha": 1.0}])
def test_colours_levels_partners_and_repeated_images(
    exchanges: Any, options: dict[str, Any], mixing: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (101, 3, 40, 50), dtype=torch.uint8, generator=generator)
    split = Split(images=images, labels=torch.arange(101).square() % 10)
    cfg = AugmentConfig(size=12, crop=0.3, saturation=0.4, hue=0.1, **mixing)
    kinds: dict[str, Any] = {"global_batch_size": 24, "micro_batch_size": 4, "seed": 1, "mixes": cfg.mixes} | options
    augment = Augment(cfg, num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3, fill=(0.4, 0.5, 0.6))
    expected = batches_of([Loader(split, **kinds)], augment, range(2, 6))
    check_equal(batches_of(spread(split, exchanges(3), **kinds), augment, range(2, 6)), expected)
    host = Exchange()
    check_equal(batches_of([Loader(split, exchange=host, **kinds)], augment, range(2, 6)), expected)
    host.close()


@pytest.mark.thorough
def test_compiled_and_interpreted_kernels_give_the_same_bits(
    train_images: Split, exchanges: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kinds: dict[str, Any] = {"global_batch_size": 16, "seed": 7, "mixes": True}
    for cfg in (
        replace(EVERYTHING, size=12, backend="triton"),
        replace(EVERYTHING, size=12, backend="compiled"),
        AugmentConfig(shift=0.1, mixup_alpha=0.4, backend="compiled"),  # whole pixels
    ):
        augment = Augment(cfg, num_classes=10, mean=(0.286,), std=(0.353,))
        expected = batches_of([Loader(train_images, **kinds)], augment, range(2))
        host = Exchange()
        check_equal(batches_of([Loader(train_images, exchange=host, **kinds)], augment, range(2)), expected)
        host.close()


def test_each_rank_holds_its_share_and_two_buffers(train_images: Split, exchanges: Any) -> None:
    split = replace(train_images, images=train_images.images[:1999], labels=train_images.labels[:1999])
    loaders = spread(split, exchanges(4), global_batch_size=64, seed=0, mixes=True)
    assert [len(loader.split.images) for loader in loaders] == [500, 500, 500, 499]
    assert {loader.staging.num_bytes for loader in loaders} == {2 * 2 * 16 * 784}  # 2 buffers, 16 images and partners
    augment = Augment(EVERYTHING, num_classes=10, mean=(0.286,), std=(0.353,))
    batches_of(loaders, augment, range(31))  # an epoch
    kept = [[buffer.data_ptr() for buffer in loader.staging._buffers] for loader in loaders]
    room = [loader.exchange._outgoing.data_ptr() for loader in loaders]
    batches_of(loaders, augment, range(31, 93))
    assert [[buffer.data_ptr() for buffer in loader.staging._buffers] for loader in loaders] == kept
    assert [loader.exchange._outgoing.data_ptr() for loader in loaders] == room


def test_a_probe_tells_what_a_step_exchanges(train_images: Split, exchanges: Any) -> None:
    kinds: dict[str, Any] = {"global_batch_size": 96, "micro_batch_size": 8, "seed": 3, "mixes": True}
    loaders = spread(train_images, exchanges(3), **kinds)
    with ThreadPoolExecutor(3) as threads:
        probed = list(threads.map(lambda loader: loader.staging.probe(), loaders))
    for loader, (num_bytes, seconds) in zip(loaders, probed, strict=True):
        asked = loader._wanted(0)[loader.rank]
        elsewhere = [position for position in asked.tolist() if position % 3 != loader.rank]
        assert len(asked) == 16 and num_bytes == 784 * len(elsewhere) > 0 and 0 < seconds < 60
    # and it disturbs nothing
    augment = Augment(EVERYTHING, num_classes=10, mean=(0.286,), std=(0.353,))
    check_equal(batches_of(loaders, augment, range(2)), batches_of([Loader(train_images, **kinds)], augment, range(2)))


def test_the_plan_says_what_an_exchange_takes(train_images: Split) -> None:
    def said(where: str, *probed: tuple[int, float]) -> str:
        staging = None if where == "device" else SimpleNamespace(probe=lambda: probed[0])
        rows = range(0, 2000, 2) if where == "spread" else None
        loader = SimpleNamespace(staging=staging, split=replace(train_images, rows=rows), accumulation_steps=4)
        run = SimpleNamespace(world_size=len(probed), gather=lambda mine: list(probed))
        return plan.exchange(loader, run)  # type: ignore[arg-type]

    # the slowest process's 5 ms, the largest share of 2 MB: 4 x 2 MB in 4 x 5 ms; 2 MB / 5 ms = 0.4 GB/s
    told = "; exchange of 8 MB a step, about 20 ms at 0.4 GB/s, measured in a probe"
    assert said("spread", (2_000_000, 0.004), (1_900_000, 0.005)) == told
    assert metric_name("train", "data_wait_ms") == "perf/data_wait_ms"  # what it comes to: on every train line
    assert said("spread", (0, 0.004)) == said("host", (1, 1.0), (1, 1.0)) == said("device", (1, 1.0), (1, 1.0)) == ""


def test_what_is_staged_while_a_batch_is_used_does_not_touch_it(train_images: Split) -> None:
    exchange = Exchange()
    loader = Loader(train_images, global_batch_size=50, seed=0, exchange=exchange)
    for step in (3, 4, 40, 2):  # jumps too: a run that is resumed begins anywhere
        (batch,) = loader.micro_batches(step)
        staged = batch.pixels()
        exchange.submit(lambda: None).result()  # the next one is there
        assert torch.equal(staged.images[staged.places], train_images.images[batch.indices])
        assert torch.equal(staged.positions[staged.places], batch.indices)
    exchange.close()


def test_an_error_of_the_thread_is_raised_where_the_images_are_taken(train_images: Split) -> None:
    exchange = Exchange()
    loader = Loader(train_images, global_batch_size=50, seed=0, exchange=exchange)

    def broken(*_: object) -> Tensor:
        raise RuntimeError("Connection closed by peer")

    loader.staging._from_host = broken
    for _ in range(2):  # and the thread goes on
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            loader.micro_batches(0)[0].pixels()
        loader.staging._next = None
    exchange.close()


def test_images_that_lie_elsewhere_are_never_read_by_index(train_images: Split) -> None:
    held = replace(train_images, images=train_images.images[::2], rows=range(0, 2000, 2))
    augment = Augment(EVERYTHING, num_classes=10, mean=(0.286,), std=(0.353,))
    with pytest.raises(AssertionError, match="have to be staged"):
        augment(Loader(held, global_batch_size=50, seed=0).micro_batches(0)[0])
    with pytest.raises(IndexError, match="images 0 to 50 are asked for"):
        held.between(0, 50)
    block = replace(train_images, images=train_images.images[100:200], rows=range(100, 200))
    assert torch.equal(block.between(150, 200), train_images.images[150:200])
    for first, last in ((50, 150), (150, 250)):
        with pytest.raises(IndexError, match=r"range\(100, 200\) are held here"):
            block.between(first, last)
    assert torch.equal(train_images.between(1990, 2040), train_images.images[1990:])


# Where they lie


def ranks(world_size: int) -> list[Processes]:
    """The processes of a run as far as their shares go."""
    made = []
    for rank in range(world_size):
        one = Processes(0, 1)
        one.rank, one.world_size = rank, world_size
        one.exchange = Exchange()
        one.exchange.rank, one.exchange.world_size = rank, world_size
        made.append(one)
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 64, 500, 5000])
def test_each_image_is_held_once_and_evaluation_finds_its_own(
    train_images: Split, world_size: int, batch_size: int
) -> None:
    whole = {"train": train_images, "val": replace(train_images, images=train_images.images[:333],
             labels=train_images.labels[:333]), "test": replace(train_images, images=train_images.images[:0],
             labels=train_images.labels[:0])}  # fmt: skip
    where = placement.Placement(where="spread", num_bytes=0, world_size=world_size)
    seen: dict[str, list[int]] = {name: [] for name in whole}
    for processes in ranks(world_size):
        for name, split in place(whole, where, processes, CPU, batch_size).items():
            assert split.rows is not None and len(split.images) == len(split.rows)
            assert torch.equal(split.images, whole[name].images[list(split.rows)])
            assert len(split) == len(whole[name]) and split.digest == whole[name].digest
            seen[name] += split.rows
            if name == "val":
                for start in processes.share(range(0, 333, batch_size)):  # as `predict` does
                    assert torch.equal(
                        split.between(start, start + batch_size), whole[name].images[start : start + batch_size]
                    )
        processes.exchange.close()
    assert {name: sorted(positions) for name, positions in seen.items()} == {
        name: list(range(len(split))) for name, split in whole.items()
    }


@pytest.mark.parametrize(
    ("wish", "world_size", "free", "host", "expected", "said"),
    [
        # 2,000 images of 784 bytes and labels of 8: 1,584,000 bytes, which 0.9 of 1,760,000 holds
        ("auto", 1, 1_760_000, 0, "device", ""),
        ("auto", 1, 1_750_000, 1_750_000, "host", "; in host memory, 1.5 MiB of images for each process"),
        ("auto", 2, 1_750_000, 10**9, "spread", "; spread over 2 processes, 0.7 MiB of images on each"),
        ("auto", 3, 700_000, 10**9, "spread", "; spread over 3 processes, 0.5 MiB of images on each"),
        ("auto", 2, 500_000, 10**9, "host", "; in host memory, 1.5 MiB of images for each process"),
        ("device", 2, 0, 0, "device", ""),
        ("spread", 2, 10**9, 0, "spread", "; spread over 2 processes, 0.7 MiB of images on each"),
        ("spread", 1, 10**9, 0, "device", ""),
        ("host", 1, 10**9, 0, "host", "; in host memory, 1.5 MiB of images for each process"),
    ],
)
def test_the_first_place_with_room_is_taken(
    train_images: Split,
    monkeypatch: pytest.MonkeyPatch,
    wish: Any,
    world_size: int,
    free: int,
    host: int,
    expected: str,
    said: str,
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: free)
    monkeypatch.setattr(placement, "host_bytes", lambda: host)
    processes = Processes(0, 1)
    processes.world_size = world_size
    found = choose_place(wish, {"train": train_images}, 500, 0, processes, torch.device("meta"))
    assert found.where == expected and str(found) == said


def test_the_bytes_are_those_of_the_process_that_holds_most(train_images: Split) -> None:
    splits = {"train": train_images, "val": replace(train_images, images=train_images.images[:1100],
              labels=train_images.labels[:1100])}  # fmt: skip
    # 2,000 over 3: 667; validation in batches of 500, the last of 100, of which two fall to one process: 1,000 at most
    assert placement.place_of("spread", splits, 3, 500).num_bytes == (667 + 500) * 784  # one batch on each
    assert placement.place_of("spread", splits, 2, 500).num_bytes == (1000 + 1000) * 784  # two batches on one
    assert placement.place_of("device", splits, 2, 500).num_bytes == (2000 + 1100) * 784


def test_no_room_anywhere_is_one_line(train_images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: 10**5)
    monkeypatch.setattr(placement, "host_bytes", lambda: 10**5)
    with pytest.raises(ValueError, match=r"data.where is auto: 0.00 GiB of images.*valid: more processes, a smaller"):
        choose_place("auto", {"train": train_images}, 500, 0, Processes(0, 1), torch.device("meta"))
    # what a CPU has read it holds
    assert choose_place("auto", {"train": train_images}, 500, 0, Processes(0, 1), CPU).where == "device"


def test_the_process_with_the_least_room_decides(train_images: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(0, 1)
    processes.world_size = 2
    monkeypatch.setattr(processes, "gather", lambda mine: [mine, (900_000, 10**9)])
    monkeypatch.setattr(placement, "free_bytes", lambda _: 10**9)
    assert choose_place("auto", {"train": train_images}, 500, 0, processes, torch.device("meta")).where == "spread"


def test_another_place_is_the_same_run(tmp_path: Path) -> None:
    from fmnist.config.same_run import differences

    one, other = (parse_config(["--output_dir", str(tmp_path), "--data.where", where]) for where in ("spread", "host"))
    assert one.data.where == "spread" and differences(one, other) == []


# Whole runs: real processes


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    started = Forks({"FMNIST_CACHE": str(tmp_path_factory.mktemp("cache"))})
    yield started
    started.close()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Data sets: Fashion-MNIST, an .npz file of colour images, and a folder of colour pictures in two classes."""
    base = tmp_path_factory.mktemp("sets")
    npz = write_npz(base / "set.npz", 5, (24, 20, 3))
    generator = torch.Generator().manual_seed(0)
    for number in range(250):
        path = base / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (30, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    return {
        "fashion_mnist": {},
        "npz": {"name": "npz", "root": str(npz)},
        "folder": {"name": "folder", "root": str(base / "photos")},
    }


def config_of(data: dict[str, Any], where: str, **choice: Any) -> dict[str, Any]:
    config = make_config(PLAIN | {"model": "cnn", "mixing": "both", "ema": True, "drop": True} | choice)
    config["batch"] |= {
        "global_batch_size": 24,
        "micro_batch_size": 2 if choice.get("parts") == "accumulated" else None,
    }
    return config | {"data": data | {"where": where}}


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_final_weights_and_batches_are_those_of_images_on_the_device(
    forks: Forks, tmp_path: Path, roots: dict[str, dict[str, Any]], processes: int
) -> None:
    seen = {}
    for where in ("device", "spread", "host"):
        (tmp_path / where).mkdir()
        config = config_of(roots["fashion_mnist"], where)
        forks.start(tmp_path / where / "run", config, processes, record=str(tmp_path / where / "batches"))
        seen[where] = recorded(tmp_path / where)
        assert difference(tmp_path / where / "run", tmp_path / "device/run") == []
    assert seen["device"].keys() == set(itertools.product(range(24), range(24)))
    assert seen["spread"] == seen["host"] == seen["device"]
    logged = [json.loads(line) for line in (tmp_path / "spread/run/metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_ms"] for line in logged if "data_wait_ms" in line]
    assert len(waits) == (24 if processes > 1 else 0) and all(0 <= wait < 60_000 for wait in waits)
    said = (tmp_path / "spread/run.log").read_text()  # what it wrote to the console
    told = f"spread over {processes} processes, 0." if processes > 1 else "data.where spread has no effect"
    assert told in said
    probed = re.findall(
        r"; exchange of 0.0\d+ MB a step, about [\d.e-]+ ms at [\d.e-]+ GB/s, measured in a probe", said
    )
    assert len(probed) == (processes > 1)


@pytest.mark.thorough
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("parts", ["accumulated", "exact"])
@pytest.mark.parametrize("name", ["npz", "folder"])
def test_other_data_sets_accumulated_and_exact(
    forks: Forks, tmp_path: Path, roots: dict[str, dict[str, Any]], name: str, parts: str, processes: int
) -> None:
    for where in ("device", "spread", "host"):
        config = config_of(roots[name], where, parts=parts, sizes="growing", mixing="cutmix")
        forks.start(tmp_path / where, config, processes)
        assert difference(tmp_path / where, tmp_path / "device") == []


@pytest.mark.thorough
def test_balanced_sampling_and_class_weights(forks: Forks, tmp_path: Path, roots: dict[str, dict[str, Any]]) -> None:
    for where in ("device", "spread"):
        config = config_of(roots["npz"] | {"limit": 100, "sampling": "balanced"}, where)
        config["optim"] |= {"class_weights": [1.0, 2.0, 1.0, 3.0, 1.0]}
        forks.start(tmp_path / where, config, 3)
    assert difference(tmp_path / "spread", tmp_path / "device") == []


@pytest.mark.thorough
def test_killed_and_resumed_with_4_2_and_3_processes_exact_keeps_the_bits(
    forks: Forks, tmp_path: Path, roots: dict[str, dict[str, Any]]
) -> None:
    config = config_of(roots["folder"], "spread", parts="exact", saved_every=1)
    config["exact"] = 12
    forks.start(tmp_path / "whole", config_of(roots["folder"], "device", parts="exact", saved_every=1) | {"exact": 12})
    for processes, step in ((4, 6), (2, 13)):
        forks.start(tmp_path / "run", config, processes, strike=[step, "micro_batch"], rank=processes - 1)
    forks.start(tmp_path / "run", config, 3)
    assert difference(tmp_path / "run", tmp_path / "whole") == []


@pytest.mark.thorough
def test_batches_through_4_2_and_3_processes_are_one_sequence(
    forks: Forks, tmp_path: Path, roots: dict[str, dict[str, Any]]
) -> None:
    for name in ("whole", "moved"):
        (tmp_path / name).mkdir()
    forks.start(tmp_path / "whole/run", config_of({}, "device"), record=str(tmp_path / "whole/batches"))
    moved: dict[str, Any] = {"record": str(tmp_path / "moved/batches")}
    config = config_of({}, "spread", saved_every=1)
    for processes, step in ((4, 6), (2, 13)):
        forks.start(tmp_path / "moved/run", config, processes, strike=[step, "update"], rank=1, **moved)
    forks.start(tmp_path / "moved/run", config, 3, **moved)
    batches = recorded(tmp_path / "whole")
    assert all(len(hashes) == 1 for hashes in batches.values())
    assert recorded(tmp_path / "moved") == batches


@pytest.mark.thorough
def test_the_place_may_change_between_two_starts(forks: Forks, tmp_path: Path) -> None:
    forks.start(tmp_path / "whole", config_of({}, "device", saved_every=1), 2)
    for where, step in (("spread", 6), ("host", 13), ("device", 18)):
        config = config_of({}, where, saved_every=1)
        forks.start(tmp_path / "run", config, 2, strike=[step, "update"], rank=0)
    forks.start(tmp_path / "run", config_of({}, "spread", saved_every=1), 2)
    assert difference(tmp_path / "run", tmp_path / "whole") == []


# Faults


def injected(kind: str, tmp_path: Path, config: Path, *more: object) -> Any:
    flags = ["--config", config, "--output_dir", tmp_path, "--data.where", "spread", "--timeout_s", 3, *more]
    launch = train if kind.endswith("_in_exchange") else warm_train  # who is lost is the launcher's to say
    return launch(kind, *flags, processes=2, script=ROOT / "tests/inject.py", check=False)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["killed_in_exchange", "fails_in_exchange", "hangs_in_exchange"])
def test_who_is_lost_in_an_exchange_is_named(kind: str, tmp_path: Path, small_config: Path) -> None:
    done = injected(kind, tmp_path, small_config)
    assert done.returncode != 0
    said = set(re.findall(r"rank (\d) ends: rank (\d) (?:is gone|does not answer)", done.stderr))
    if kind == "hangs_in_exchange":
        assert said == {("0", "1")}, done.stderr
    else:  # the launcher may end the other first
        assert said <= {("0", "1")} and re.search(r"rank\s*: 1 ", done.stderr.partition("Root Cause")[2]), done.stderr
    if kind == "fails_in_exchange":
        assert "KeyError: 'planted'" in done.stderr
    newest = Checkpoints(tmp_path / kind / "checkpoints", 2, {}).newest_good()
    # Step 7 is under way; it ends where the thread alone hangs, or fails, which the next step notices, or is late.
    assert newest is not None and read_state(newest).step in (6, 7)


@pytest.mark.thorough
def test_a_slow_rank_is_waited_for_and_the_wait_is_logged(tmp_path: Path, small_config: Path) -> None:
    done = injected("slow_exchange", tmp_path, small_config)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "slow_exchange/metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_ms"] for line in lines if line["prefix"] == "train"]
    # A step of this model takes less than the 200 ms that each of its images' exchanges is late.
    assert len(waits) == 12 and sorted(waits)[6] > 20


@pytest.mark.thorough
def test_a_batch_that_is_not_finite_is_drawn_whole(tmp_path: Path, small_config: Path) -> None:
    done = injected("loss_of_one_rank", tmp_path, small_config)
    assert "at step 7 (the loss of rank 1); the batch is drawn in" in done.stderr, done.stderr
    assert (tmp_path / "loss_of_one_rank/non_finite_step_00000007.png").stat().st_size > 10_000
    assert (tmp_path / "loss_of_one_rank/train_batch.png").exists()


@pytest.mark.thorough
def test_a_cache_that_is_damaged_for_one_rank_only_is_one_line(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (12, 12), dtype=torch.uint8, generator=generator).numpy()).save(path)
    script = tmp_path / "two_machines.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"os.environ['FMNIST_CACHE'] = {str(tmp_path)!r} + '/cache' + os.environ['RANK']\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--data.name", "folder", "--data.root", tmp_path / "photos", "--data.where", "spread", "--dry_run"]
    flags += ["--batch.global_batch_size", 8, "--output_dir", tmp_path / "run"]
    warm_train(*flags, processes=2, script=script)
    (array,) = (tmp_path / "cache1").glob("*.npy")
    content = bytearray(array.read_bytes())
    for at in range(128, len(content), 144):
        content[at] ^= 1
    array.write_bytes(content)
    done = train(*flags, processes=2, script=script, check=False)
    assert done.returncode != 0
    assert re.search(r"data.root: the decoded train images of \S+ are damaged", done.stderr), done.stderr


@pytest.mark.thorough
def test_images_of_a_cpu_process_are_not_copied_to_its_device(tmp_path: Path) -> None:
    script = tmp_path / "moves.py"
    script.write_text(
        "import torch\nfrom fmnist.runtime.compute import Compute\n"
        "with Compute() as compute:\n"
        "    images = torch.zeros(3)\n"
        "    here = str(compute.device), images.to(compute.device).data_ptr() == images.data_ptr()\n"
        "    compute.on_main(print, compute.gather(here))\n"
    )
    done = run_program(script, env=environment(), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[('cpu', True), ('cpu', True)]\n"  # Accelerate's names: cpu:0 and cpu:1


@pytest.mark.thorough
def test_the_benchmark_times_the_exchange_alone_and_in_the_step(tmp_path: Path) -> None:
    out = tmp_path / "spread.json"
    program = ["-m", "fmnist.benchmark.spread", "--model", "mlp@28", "--batch", 16, "--rounds", 3, "--steps", 2]
    done = run_program(*program, "--output", out, env=environment(), processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert (found["name"], found["world_size"], found["options"]["steps"]) == ("spread", 2, 2)
    assert all(len(found[name]["rounds_ms"]) == 3 for name in ("exchange", "device", "spread", "wait"))
    assert 0 < found["exchanged_bytes"] <= 16 * 784 and found["exchanged_bytes"] % 784 == 0
    rate = found["exchanged_bytes"] / found["exchange"]["median_ms"] * 1000
    assert found["bytes_per_second"] == pytest.approx(rate)
    assert len(re.findall(r"^(exchange alone|step, images .*?) +[\d.]+ ms", done.stdout, re.MULTILINE)) == 3
    alone = run_program("-m", "fmnist.benchmark.spread", "--output", out, env=environment())
    assert alone.returncode == 2 and "one process exchanges nothing: torchrun --nproc_per_node 2" in alone.stderr
