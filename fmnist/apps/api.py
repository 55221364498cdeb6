"""Train, open and use runs from Python; `fmnist` re-exports it."""

import contextlib
import importlib.util
import io
import logging
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from fmnist.apps.novelty import open_reference
from fmnist.apps.trust import open_trust
from fmnist.apps.views import read_view, view_of
from fmnist.config.parse import parse_config, update
from fmnist.config.schema import Config, flatten
from fmnist.config.shipped import shipped
from fmnist.data.info import DataInfo
from fmnist.data.photos import as_rgb
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Request, evaluate
from fmnist.runtime.compute import Compute
from fmnist.runtime.console import MAX_ERROR, one_line
from fmnist.tracking.metrics_file import METRICS_FILE, read_metrics
from fmnist.trained import Trained, open_trained

Picture = str | Path | Image.Image | np.ndarray | Tensor
EXPECTED = "paths, PIL pictures, or uint8 arrays or tensors [N, H, W] or [H, W], 0 to 255"
DEFAULT_TOP = 3
IN_COLOUR = "[N, 3, H, W], [3, H, W], [N, H, W, 3] or [H, W, 3]"


class Answer(list[tuple[str, float]]):
    """A picture's likeliest classes, (name, probability), the likeliest first.

    Attributes:
        set: the classes that may be right, the likeliest first; None where no coverage was asked for.
        decision: automatic or person; None where no max_error was asked for.
    """

    def __init__(self, likeliest: Iterable[tuple[str, float]], names: tuple[str, ...] | None, decision: str | None):
        super().__init__(likeliest)
        self.set, self.decision = names, decision


class RunResults:
    """A run, finished or still training: its numbers and its predictions. Made by `train` and `open_run`.

    Attributes:
        directory: the run directory.
    """

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        self._path, self._device = Path(path), device
        self.directory = self.trained.directory

    def __repr__(self) -> str:
        return f"fmnist.open_run({str(self._path)!r})"

    @cached_property
    def trained(self) -> Trained:
        """The weights and the config; call it on uint8 images for logits and features."""
        return open_trained(self._path, self._device)

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds; empty before the run has stopped or finished."""
        return self.trained.summary

    def metrics(self) -> list[dict[str, Any]]:
        """Return what was logged, in step order: dicts of `step`, `epoch`, `prefix` (train, val, test) and scalars."""
        lines = [line for part in read_metrics(self.directory / METRICS_FILE).values() for line in part]
        return sorted(lines, key=lambda line: int(line["step"]))

    def predict(
        self,
        images: Picture | Sequence[Picture],
        top: int = DEFAULT_TOP,
        *,
        calibrate: bool = True,
        coverage: float | None = None,
        max_error: float | None = None,
        root: str | Path | None = None,
    ) -> list[Answer]:
        """Predict pictures.

        Args:
            images: one or several paths of pictures or PIL pictures, which are made to look like the run's own images
                as `fmnist predict` does; or uint8 arrays or tensors, [N, H, W] or [H, W] (in colour [N, 3, H, W],
                [3, H, W], [N, H, W, 3] or [H, W, 3]), 0 to 255, taken as they are. They may be mixed, and of several
                sizes.
            top: classes per picture, 1 to num_classes; by default 3, or both of two.
            calibrate: scale confidences by the temperature that the run fitted on its validation images.
            coverage: find the set of each picture that holds its true class in this share of cases, 0.01 to 0.9999.
            max_error: decide which answers are automatic, at most this share of them wrong, 0.0001 to 0.5.
            root: where the data set lies, which both are judged on; None takes the run's.

        Returns:
            For each picture its likeliest classes, (name, probability), the likeliest first, with `set` and `decision`.

        Raises:
            ValueError: a picture that cannot be read or is empty; another type or shape; a run without validation
                images to judge by; one line.
        """
        trained, names = self.trained, self.trained.class_names
        top = len(names) if top == DEFAULT_TOP > len(names) else top
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or not 1 <= top <= len(names):
            raise ValueError(f"top is {top!r}; valid: a whole number from 1 to {len(names)}")
        one = isinstance(images, Picture)
        if not one and (isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable)):
            raise ValueError(f"images is {images!r:.100}; expected {_expected(trained.info)}")
        pictures: Iterable[Any] = [images] if one else images  # type: ignore[assignment]
        views = [_as_views(picture, trained.info) for picture in pictures]
        place = None if root is None else str(root)
        trust = open_trust(trained, coverage=coverage, max_error=max_error, calibrate=calibrate, root=place)
        reference = None if max_error is None else open_reference(trained, place)
        answers = []
        for part in _stacked(views):
            logits, features = trained(part)
            chances = trained.probabilities(logits, calibrate=calibrate)
            far = torch.zeros(len(part)) if reference is None else reference.score(features) - reference.threshold
            values, labels = chances.topk(int(top))
            for row, *likeliest, unfamiliar in zip(chances, values.tolist(), labels.tolist(), far > 0, strict=True):
                named = [(names[label], value) for value, label in zip(*likeliest, strict=True)]
                answers.append(Answer(named, *trust.decide(row, unfamiliar=bool(unfamiliar))))
        return answers

    def evaluate(
        self, split: Literal["test", "val", "train"] = "test", tta: Literal["none", "flip"] | None = None
    ) -> dict[str, Any]:
        """Evaluate the weights on a split; nothing is written.

        Args:
            split: the images.
            tta: flip averages each image and its mirror; None takes the run's own setting.

        Returns:
            What `fmnist evaluate --quick` writes to metrics.json: `top1`, `loss`, `num_images`, `confusion_matrix`,
            `per_class`, `ece`, confidence intervals.
        """
        with _process_left_as_it_was(), Compute(device=str(self.trained.device)) as compute:
            outcome = evaluate(self.trained, compute, Request(split=split, tta=tta, quick=True))
            assert outcome is not None  # there is one process
            return findings(outcome, quick=True).metrics


def open_run(path: str | Path, device: str | None = None) -> RunResults:
    """Open a run directory, or one of its checkpoints.

    Args:
        path: what `train` wrote.
        device: as torch names it; None takes the accelerator where there is one, else the CPU.

    Raises:
        ValueError: the path is neither; one line.
    """
    return RunResults(path, device)


def train(config: str | Path | Config = "configs/cnn.yaml", **options: Any) -> RunResults:
    """Train a model in this process, or resume it, as `fmnist train` does.

    The same call again resumes a run that was stopped, and returns one that is finished. Logging, signal handlers,
    random state and determinism are as before when it returns. Ctrl-C (a notebook's stop button) stops the run and
    returns it; SIGTERM, SIGUSR1 and SIGHUP act on the program too, once the run has saved. Several processes need
    `torchrun -m fmnist train`.

    Args:
        config: a YAML file, or a Config.
        options: what differs from it, by the names of the YAML file: a section with its fields,
            `schedule={"epochs": 2}`, or an option at the root, `seed=3`; dotted names too, `**{"schedule.epochs": 2}`.

    Returns:
        The run, open.

    Raises:
        ValueError: an unknown or contradictory option, or data or a run directory that cannot be used; one line.
    """
    flags = [] if isinstance(config, Config) else ["--config", str(config)]
    given: dict[str, Any] = {}
    for name, value in options.items():
        section = isinstance(value, Mapping) and name in Config.__dataclass_fields__
        given |= {f"{name}.{field}": inner for field, inner in value.items()} if section else {name: value}
    wanted = update(flatten(config), given) if isinstance(config, Config) else given
    if wanted.get("schedule.minutes") is not None and "schedule.epochs" not in given:
        wanted.pop("schedule.epochs", None)  # a Config has a number of epochs always: it is not asked for
    flags += [f"--{name}={_as_flag(value)}" for name, value in wanted.items()]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            cfg = parse_config(flags)
    except SystemExit as end:  # raised while a ValueError was handled
        raise ValueError(one_line(end.__context__ or end, MAX_ERROR)) from None
    if cfg.dry_run:
        raise ValueError("dry_run trains nothing; use fmnist train --dry_run")
    spec = importlib.util.spec_from_file_location("fmnist_train_script", shipped("train.py"))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)  # the loop itself stands in train.py
    with _process_left_as_it_was():
        number = script.run_training(cfg)
    if number not in (0, signal.SIGINT):  # it asks the program to end, not the run alone
        signal.raise_signal(number)
    return RunResults(cfg.output_dir or "")


def _as_flag(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, np.generic):
        value = value.item()
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")


def _expected(info: DataInfo) -> str:
    return EXPECTED if info.shape[0] == 1 else EXPECTED.replace("[N, H, W] or [H, W]", IN_COLOUR)


def _as_views(picture: Picture, info: DataInfo) -> Tensor:
    """Return uint8 [N, H, W], or [N, 3, H, W] in colour, as the model takes them."""
    if isinstance(picture, str | Path):
        return read_view(str(picture), info)[None]
    if isinstance(picture, Image.Image):
        with contextlib.suppress(Exception):  # broken metadata does not make a broken picture
            ImageOps.exif_transpose(picture := picture.copy(), in_place=True)
        return torch.from_numpy(view_of(as_rgb(picture) if info.is_fashion_mnist else picture, info).view)[None]
    if not isinstance(picture, np.ndarray | Tensor):
        raise ValueError(f"a picture is {picture!r:.100}; expected {_expected(info)}")
    kind, shape, in_colour = str(picture.dtype).removeprefix("torch."), list(picture.shape), info.shape[0] == 3
    last = in_colour and shape[-1:] == [3] != shape[-3:-2]
    fits = len(shape) in ((3, 4) if in_colour else (2, 3)) and (last or not in_colour or shape[-3] == 3)
    if kind != "uint8" or not fits or 0 in shape[1:] or 0 in shape[-2:]:
        valid = IN_COLOUR if in_colour else "[N, H, W] or [H, W]"
        raise ValueError(f"images are {kind} {shape}; expected uint8 {valid}, 0 to 255")
    if isinstance(picture, np.ndarray):
        # torch takes no negative strides, as of a mirrored array, and warns of what is read-only, as PIL's is
        picture = torch.from_numpy(np.require(picture, requirements=["C", "W"]))
    array = picture.cpu()
    array = array.movedim(-1, -3) if last else array
    return array if array.ndim == 3 + in_colour else array[None]


def _stacked(views: Sequence[Tensor]) -> Iterator[Tensor]:
    """Put neighbours of one size together, so that the model takes them at once."""
    for _, part in groupby(views, key=lambda view: view.shape[1:]):
        yield torch.cat(list(part))


@contextlib.contextmanager
def _process_left_as_it_was() -> Iterator[None]:
    """Put back log handlers, random state, threads and determinism, for a notebook that goes on."""
    logger = logging.getLogger("fmnist")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    cudnn, tf32 = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = cudnn, tf32
        torch.set_num_threads(threads)
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
