"""The monitor raises false alarms at its stated rate, and alarms for batches that differ."""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from idx_files import write_small
from pictures import digits, learned_run
from PIL import Image
from small import command

from fmnist.apps.monitor.__main__ import main
from fmnist.apps.monitor.batch import read_batch, report
from fmnist.apps.monitor.drift import BatchSums, DriftTest, describe, drift_test
from fmnist.apps.novelty import NoveltyReference, open_reference
from fmnist.data.fashion_mnist import CLASS_NAMES, INFO, load_split
from fmnist.trained import Trained, open_trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return open_trained(learned_run(tmp_path_factory), "cpu")


@pytest.fixture(scope="module")
def reference(trained: Trained) -> NoveltyReference:
    return open_reference(trained)


@pytest.fixture(scope="module")
def seen(trained: Trained) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, features and labels of the first 5,000 test images."""
    images, labels = load_split("test", None, 2000)
    return (*trained(images[:5000]), labels[:5000])


def alarms(reference: NoveltyReference, logits: torch.Tensor, features: torch.Tensor, rate: float) -> bool:
    batch = BatchSums(reference)
    batch.add(logits, features)
    return bool(drift_test(batch, rate).alarms.any())


@pytest.mark.thorough
def test_false_alarms_come_at_the_stated_rate(
    reference: NoveltyReference, seen: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, features, _ = seen
    kept: dict[int, object] = {}
    import fmnist.apps.monitor.drift

    draw = fmnist.apps.monitor.drift._resampled_means

    def once(rng: np.random.Generator, rows: np.ndarray, size: int) -> object:
        # The draws depend on the size alone (the seed is fixed), so a hundred batches of a size can share them.
        if size not in kept:
            kept[size] = draw(rng, rows, size)
        return kept[size]

    monkeypatch.setattr(fmnist.apps.monitor.drift, "_resampled_means", once)
    generator = torch.Generator().manual_seed(0)
    raised = 0
    for _ in range(100):
        chosen = torch.randint(0, len(logits), (60,), generator=generator)
        raised += alarms(reference, logits[chosen], features[chosen], 0.05)
    # 5 of 100 are expected; 13 and more come with a probability of 0.1 %.
    assert 0 <= raised <= 12, raised


def test_digits_and_a_single_class_are_alarms(
    trained: Trained, reference: NoveltyReference, seen: tuple[torch.Tensor, ...]
) -> None:
    logits, features, labels = seen
    assert alarms(reference, *trained(digits()[:40]), 0.01)
    one = labels == 7
    assert alarms(reference, logits[one][:40], features[one][:40], 0.01)
    mixed = torch.cat([features[:30], trained(digits()[:30])[1]])  # half of them
    assert alarms(reference, torch.cat([logits[:30], trained(digits()[:30])[0]]), mixed, 0.01)


def test_sums_do_not_depend_on_the_parts(reference: NoveltyReference, seen: tuple[torch.Tensor, ...]) -> None:
    logits, features, _ = seen
    whole, parts = BatchSums(reference), BatchSums(reference)
    whole.add(logits[:90], features[:90])
    for start in range(0, 90, 40):
        parts.add(logits[start : min(start + 40, 90)], features[start : min(start + 40, 90)])
    assert parts.num_images == 90 and np.allclose(whole.mean, parts.mean, atol=1e-12)
    assert np.allclose(whole.mean, describe(reference, logits[:90], features[:90]).mean(0).numpy())
    assert whole.mean[:10].sum() == pytest.approx(1)


def test_batches_are_read_from_arrays_and_folders(tmp_path: Path) -> None:
    images = load_split("test", None, 2000)[0][:300]
    np.save(tmp_path / "a.npy", images.numpy())
    np.savez(tmp_path / "b.npz", images=images.numpy(), labels=np.zeros(300))
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "c-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
    for name in ("a.npy", "b.npz", "c-idx3-ubyte"):
        parts = list(read_batch(tmp_path / name, INFO, Counter()))
        assert (
            torch.equal(torch.cat([part for part, _ in parts]), images) and max(len(part) for part, _ in parts) <= 256
        )
    (tmp_path / "folder").mkdir()
    for index in range(3):
        Image.fromarray(images[index].numpy()).save(tmp_path / "folder" / f"{index}.png")
    (tmp_path / "folder" / "bad.png").write_bytes(b"")
    (tmp_path / "folder" / "notes.txt").write_bytes(b"")
    (part, errors) = next(read_batch(tmp_path / "folder", INFO, left_out := Counter()))
    assert torch.equal(part, images[:3]) and errors == {".png": 1} and left_out == {".txt": 1}


def test_bad_batches_are_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((3, 28, 28)))
    np.save(tmp_path / "shape.npy", np.zeros((3, 28), dtype=np.uint8))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "short.npz").write_bytes(b"PK")
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    (tmp_path / "text").write_text("hello there, no images here")
    for name in ("float.npy", "shape.npy", "pickle.npy", "short.npz", "two.npz", "text"):
        with pytest.raises(ValueError, match=name) as error:
            list(read_batch(tmp_path / name, INFO, Counter()))
        assert "\n" not in str(error.value)


def test_the_command_says_it_in_a_line_a_json_and_a_status(trained: Trained, tmp_path: Path) -> None:
    images = load_split("test", None, 2000)[0][:400]
    np.save(tmp_path / "usual.npy", images.numpy())
    np.save(tmp_path / "digits.npy", digits()[:50].numpy())
    np.save(tmp_path / "few.npy", images[:4].numpy())
    run = trained.directory
    for name, verdict, status in (("usual", "fine", 0), ("digits", "alert", 1), ("few", "too few", 2)):
        batch = tmp_path / f"{name}.npy"
        said = command(main, run, batch, status=status, lines=0)
        assert said.startswith(f"{verdict}: ") and said.count("\n") == 1
        result = json.loads(command(main, run, batch, "--json", status=status, lines=0))
        assert result["verdict"] == verdict and result["line"] == said.strip()
        if verdict == "too few":
            assert "at least 5" in result["line"]
        else:
            assert any(signal["alarm"] for signal in result["signals"].values()) == (verdict == "alert")
            assert sum(result["batch_means"]["class_mix"].values()) == pytest.approx(1)
            assert 0 <= result["usual_means"]["unfamiliar"] < 0.1 < result["usual_means"]["confidence"]
    assert "BATCH: absent: no such file or folder" in command(main, run, "absent", status=2)
    place = write_small(tmp_path / "data", 5000, 100)
    other = command(main, run, tmp_path / "usual.npy", "--data.root", place, status=2, lines=None)
    assert "holds other validation images or labels than run was made with" in other  # which would say what is usual
    rate = command(main, run, tmp_path / "few.npy", "--false_alarms", 0.0001, status=2)
    assert "--false_alarms: '0.0001' is not valid; valid range: 0.005 to 0.5" in rate


def test_the_lines_of_the_page_are_those_it_prints() -> None:
    page, means = (ROOT / "docs/photos.md").read_text().splitlines(), np.zeros((2, 12))
    means[:, [0, 10, 11]] = (0.4, 0.5031, 0.996), (0.104, 0.9436, 0.05)  # T-shirt/top, confidence, unfamiliar
    alert = DriftTest(
        values=np.array([0, 0, 0, 0.314]), limits=np.array([0, 0, 0, 0.00141]), p=np.zeros(4), joint_p=0.51,
        alarms=np.array([True] * 4), usual=means[1],
    )  # fmt: skip
    asked = argparse.Namespace(run="run", batch="batch", false_alarms=0.01)
    for number, tested in ((1797, alert), (400, replace(alert, alarms=np.array([False] * 4)))):
        batch = SimpleNamespace(num_images=number, mean=means[0])
        assert report(batch, tested, Counter(), Counter(), CLASS_NAMES, asked)["line"] in page  # type: ignore[arg-type]
