"""The ONNX graph with int8 weights and activations, for a CPU, and what that costs: measured on validation images."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmnist.apps.export.expected import Expected
from fmnist.apps.export.onnx import float_graph, open_session
from fmnist.evaluation.cost import time_batches
from fmnist.evaluation.ranking import mcnemar
from fmnist.runtime.console import counted, one_line
from fmnist.runtime.files import temporary_folder, write_atomic

NUM_CALIBRATION, SEED, PART = 512, 0, 64  # training images that activation ranges are taken from; their draw; at a time
TIMED = 256  # images of the larger batch that is timed
WEIGHTED = ("Conv", "Gemm", "MatMul")  # operators with weights, in int8; what lies between them follows
BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "Concat", "Mul", "Sigmoid", "HardSwish")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A graph in float32 beside the same in int8, on the validation images.

    Attributes:
        top1_float, top1_int8: accuracies.
        num_images: of the validation.
        only_float, only_int8: images that only one of them gets right.
        p: McNemar's exact probability.
        mb_float, mb_int8: sizes of the files, 10^6 bytes.
        ms_float, ms_int8: milliseconds of one picture alone.
        ms_float_of_256, ms_int8_of_256: of one in a batch of 256.
        kept_float: names of the operators with weights that stay in float32.
    """

    top1_float: float
    top1_int8: float
    num_images: int
    only_float: int
    only_int8: int
    p: float
    mb_float: float
    mb_int8: float
    ms_float: float
    ms_int8: float
    ms_float_of_256: float
    ms_int8_of_256: float
    kept_float: tuple[str, ...]


def write_int8(
    expected: Expected,
    path: Path,
    root: str | None = None,
    max_loss: float = 0.005,
    keep_float: Sequence[str] = (),
    *,
    reduce_range: bool = False,
) -> str:
    """Write the int8 graph where it loses little accuracy, else leave no file; return the proof, for people.

    Static quantisation: QDQ, weights per channel; ranges of activations are the smallest and largest on training
    images.

    Args:
        expected: the run and its answers.
        path: the .onnx file.
        root: folder of the data set; None takes the run's.
        max_loss: of validation top1, 0 to 1, that passes.
        keep_float: first, last, or both: layers that stay in float32.
        reduce_range: weights in 7 bits: on x86 processors without VNNI sums of 8 bits may saturate.

    Raises:
        ValueError: one line: no validation images, the float graph differs from torch, or too much is lost.
    """
    validation = expected.trained.split("val", root, own=True)
    training = expected.trained.split("train", root).images
    proto, _ = float_graph(expected)
    drawn = torch.randperm(len(training), generator=torch.Generator().manual_seed(SEED))[:NUM_CALIBRATION]
    before = proto.SerializeToString()
    try:
        quantised, kept = _quantise(before, training[drawn].numpy(), path, keep_float, reduce_range)
    except Exception as error:  # onnxruntime's exceptions share no type of their own
        raise ValueError(f"onnxruntime cannot quantise the graph: {one_line(error)}") from error
    proof = prove(before, quantised.SerializeToString(), validation.images, validation.labels, kept)
    lost = (proof.only_float - proof.only_int8) / proof.num_images  # from counts: no rounding at the limit
    if lost > max_loss:
        more = "" if len(keep_float) == 2 else "--keep_float first last, or "
        raise ValueError(
            f"int8 takes validation top1 from {proof.top1_float:.4f} to {proof.top1_int8:.4f}, which is more than "
            f"--max_loss {max_loss:g}; valid: {more}a larger --max_loss"
        )
    about = {entry.key: entry.value for entry in proto.metadata_props} | {"int8": json.dumps(asdict(proof))}
    import onnx

    onnx.helper.set_model_props(quantised, about)
    onnx.checker.check_model(quantised)
    write_atomic(path, quantised.SerializeToString())
    return f"{path}: {said(proof)}"


def said(proof: Proof) -> str:
    """Return a proof in words."""
    kept = f"; in float32: {', '.join(proof.kept_float)}" if proof.kept_float else ""
    return (
        f"{proof.mb_int8:.2f} MB, in float32 {proof.mb_float:.2f}{kept}\n"
        f"validation top1 {100 * proof.top1_int8:.2f} %, in float32 {100 * proof.top1_float:.2f} % "
        f"({proof.num_images:,} images; only int8 right : only float32 right {proof.only_int8}:{proof.only_float}, "
        f"McNemar p {proof.p:.2g})\n"
        f"{proof.ms_int8:.3g} ms a picture, in float32 {proof.ms_float:.3g}; in batches of {TIMED} "
        f"{proof.ms_int8_of_256:.3g} and {proof.ms_float_of_256:.3g} (onnxruntime, "
        f"{counted(torch.get_num_threads(), 'thread')})"
    )


def _quantise(
    graph: bytes, images: np.ndarray, path: Path, keep_float: Sequence[str], reduce_range: bool
) -> tuple[Any, tuple[str, ...]]:
    """Return the quantised graph, and the names of the operators with weights that were left as they are."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts: Iterator[np.ndarray] = iter(np.array_split(images, max(1, len(images) // PART)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self.parts, None)
            return None if part is None else {"images": part}

    root = logging.getLogger()
    level = root.level
    with temporary_folder(path) as folder:
        plain, prepared, quantised = (folder / f"{name}.onnx" for name in ("plain", "prepared", "int8"))
        plain.write_bytes(graph)
        try:
            root.setLevel(logging.ERROR)  # its advice to its own users
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            weighted = [node.name for node in onnx.load(prepared).graph.node if node.op_type in WEIGHTED]
            kept = tuple(dict.fromkeys(weighted[{"first": 0, "last": -1}[which]] for which in keep_float))
            quantize_static(
                prepared,
                quantised,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=[*WEIGHTED, *BETWEEN],
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(kept),
            )
        finally:
            root.setLevel(level)
        proto = onnx.load(quantised)
    text = proto.SerializeToString()
    assert os.fsencode(folder) not in text  # no path of this machine in a file for others
    return proto, kept


def prove(before: bytes, after: bytes, images: Tensor, labels: Tensor, kept: tuple[str, ...]) -> Proof:
    """Run both graphs over the images, and time them on this CPU.

    Args:
        before, after: the graphs in float32 and in int8.
        images: uint8 [N, H, W] or [N, 3, H, W].
        labels: int64 [N].
        kept: see `Proof`.
    """
    right, times = [], []
    for graph in (before, after):
        session = open_session(graph)

        def logits(part: Tensor, session: Any = session) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": part.numpy()})[0])

        right.append(torch.cat([logits(part).argmax(-1) for part in images.split(TIMED)]) == labels)
        batches = images[:1], images[torch.arange(TIMED) % len(images)]
        times.append([time_batches(lambda part=part: logits(part), len(part), int).median_ms for part in batches])  # type: ignore[misc]
    only_float, only_int8, p = mcnemar(right[0], right[1])
    return Proof(
        top1_float=float(right[0].double().mean()),
        top1_int8=float(right[1].double().mean()),
        num_images=len(labels),
        only_float=only_float,
        only_int8=only_int8,
        p=p,
        mb_float=len(before) / 1e6,
        mb_int8=len(after) / 1e6,
        ms_float=times[0][0],
        ms_int8=times[1][0],
        ms_float_of_256=times[0][1] / TIMED,
        ms_int8_of_256=times[1][1] / TIMED,
        kept_float=kept,
    )
