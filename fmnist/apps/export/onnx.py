"""A run as one ONNX graph: uint8 pictures in, logits and probabilities out."""

import importlib.util
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmnist.apps.export.expected import Expected
from fmnist.runtime.console import one_line
from fmnist.runtime.files import write_atomic
from fmnist.trained import Trained

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1e-4  # of any logit or probability; where logits exceed 10, in proportion: fp32 rounds so
OPSET = 18


class Deployed(nn.Module):
    """Resize, normalise and classify: the run as evaluation uses it, in one module.

    Args:
        trained: the run, in float32.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model, self.augment, self.size = trained.model, trained.augment, trained.size
        self.temperature = trained.temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and calibrated probabilities, float32 [B, num_classes], of images uint8 [B, (3,) H, W]."""
        logits = self.model(self.augment.evaluation(images, self.size))
        return logits, (logits / self.temperature).softmax(-1)


def write_onnx(expected: Expected, path: Path) -> str:
    """Write the graph where it agrees with torch, else leave no file; return the check's result, for people.

    Args:
        expected: the run and its answers.
        path: the .onnx file.

    Raises:
        ValueError: see `float_graph`.
    """
    proto, seen = float_graph(expected)
    write_atomic(path, proto.SerializeToString())
    return (
        f"{path}: {path.stat().st_size / 1e6:.2f} MB; on {len(expected.images):,} {expected.split} images the largest "
        f"difference from torch is {seen['logits']:.1e} in logits, {seen['probabilities']:.1e} in probabilities; "
        f"onnxruntime {seen['images_per_second']:,.0f} images/s on this CPU"
    )


def float_graph(expected: Expected) -> tuple[Any, dict[str, float]]:
    """Return the graph, with what it says about itself, and what `check` found.

    Raises:
        ValueError: one line: a package is missing, torch cannot export the model, or the graph gives other numbers.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"export to ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt -c constraints.txt"
        )
    import onnx

    trained = expected.trained
    proto = _trace(expected)
    about = {
        "class_names": json.dumps(trained.class_names),
        "data": trained.info.title,
        "data_info": json.dumps(trained.info.to_json()),  # what a program needs to make pictures into its images
        "run": trained.name,
        "model": trained.cfg.model.name,
        "weights_sha256": trained.digest,
        "image_size": str(trained.size),
        "temperature": repr(trained.temperature),  # what probabilities divide the logits by
    }
    onnx.helper.set_model_props(proto, about)
    onnx.checker.check_model(proto)
    return proto, check(proto.SerializeToString(), expected)


def _trace(expected: Expected) -> Any:
    """Export with torch.export, the batch dimension free."""
    deployed = Deployed(expected.trained).eval()
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    # timm's attention in plain products: the exporter cannot take torch's fused one apart where it has a bias
    fused = [module for module in deployed.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False  # type: ignore[assignment]
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own future
            program = torch.onnx.export(
                deployed,
                (expected.images[[0, -1]],),  # two: a batch of one would be taken for a constant
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                input_names=["images"],
                output_names=["logits", "probabilities"],
                opset_version=OPSET,
                verbose=False,
            )
        assert program is not None  # only the older exporter gives none
        proto = program.model_proto
        graph = proto.graph
        for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *proto.functions):
            del part.metadata_props[:]  # stack traces, with the paths of this machine
        return proto
    except Exception as error:  # the exporter raises errors of any kind
        name = expected.trained.cfg.model.name
        raise ValueError(f"torch cannot export {name} to ONNX: {_reason(error)}") from error
    finally:
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the first line of what made the exporter give up; it wraps that in advice for its own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__


def open_session(graph: Path | bytes) -> Any:
    """Open a graph in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # those of the job; its own default takes every core
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def check(graph: Path | bytes, expected: Expected) -> dict[str, float]:
    """Run a graph in onnxruntime over the expected images, in batches of several sizes.

    Args:
        graph: the .onnx file, or its content.
        expected: the run's images and logits.

    Returns:
        The largest difference of `logits` and of `probabilities`, and `images_per_second` of the largest batch.

    Raises:
        ValueError: one line, for a graph that cannot be run, or a difference that is not under LARGEST_DIFFERENCE.
    """
    count = len(expected.images)
    sizes = [size for size in (min(count, 1), min(count - 1, 7), count - 8) if size > 0]
    try:
        session = open_session(graph)
        parts = [session.run(None, {"images": part.numpy()}) for part in expected.images.split(sizes)]
        start = time.perf_counter()
        session.run(None, {"images": expected.images[-sizes[-1] :].numpy()})
        seconds = time.perf_counter() - start
    except Exception as error:  # onnxruntime's exceptions share no type of their own
        raise ValueError(f"onnxruntime cannot run the graph: {one_line(error)}") from error
    logits, probabilities = (torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in (0, 1))
    calibrated = expected.trained.probabilities(expected.logits)
    pairs = {"logits": (logits, expected.logits), "probabilities": (probabilities, calibrated)}
    differences = {name: float((got - wanted).abs().max()) for name, (got, wanted) in pairs.items()}
    for name, difference in differences.items():
        scaled = LARGEST_DIFFERENCE * max(1.0, float(pairs[name][1].abs().max()) / 10)
        if not difference < scaled:  # a NaN does not pass
            raise ValueError(
                f"the ONNX graph's {name} differ from torch's by {difference:.1e}; the limit is {scaled:.0e}"
            )
    return differences | {"images_per_second": sizes[-1] / seconds}
