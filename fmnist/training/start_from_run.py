"""Begin from the weights of another run: all tensors, but for a new head where the classes differ."""

import logging
from collections.abc import Sequence

from torch import nn

from fmnist.checkpoint.start_weights import find_start_weights
from fmnist.checkpoint.tensors import non_finite, read_tensors_and_digest
from fmnist.config.schema import ModelConfig
from fmnist.data.info import read_info
from fmnist.models.head import head_parameters
from fmnist.models.weights import mismatches

logger = logging.getLogger("fmnist")


def start_from_run(model: nn.Module, cfg: ModelConfig, class_names: Sequence[str]) -> str:
    """Fill a model with another run's weights to use; where its classes were others, the head keeps its first values.

    Args:
        model: of `cfg`, as built.
        cfg: `weights` names the run or checkpoint.
        class_names: in label order.

    Returns:
        The sha256 of the very bytes that were read.

    Raises:
        ValueError: weights that are damaged or do not fit; one line.
    """
    where, found = f"model.weights: {cfg.weights}", find_start_weights(cfg.weights or "")
    other = found.cfg.model
    if other.name != cfg.name:
        raise ValueError(f"{where} is a run of {other.name}, model.name is {cfg.name}; valid: {other.name}")
    if other.has_pretrained_input != cfg.has_pretrained_input:
        began = "began from" if other.has_pretrained_input else "did not begin from"
        wanted = str(other.has_pretrained_input).lower()
        raise ValueError(
            f"{where} {began} pretrained weights, which decides what its first layer reads; valid: "
            f"--model.pretrained {wanted}"
        )
    tensors, digest = read_tensors_and_digest(found.file)
    if found.sha256 not in ("", digest):
        raise ValueError(f"{where}: {found.file} does not have the hash its run names: it was changed afterwards")
    if bad := non_finite(tensors):
        raise ValueError(f"{where}: {found.file} holds non-finite values in {', '.join(bad[:3])}")

    own, heads = model.state_dict(), {id(p) for p in head_parameters(model)}
    head = {name for name, p in model.named_parameters() if id(p) in heads}
    left_out = set() if read_info(found.run).class_names == tuple(class_names) else head
    body = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    if misfits := mismatches(body, {name: tensor for name, tensor in own.items() if name not in left_out}):
        raise ValueError(f"{where} does not fit {cfg.name} as configured: {'; '.join(misfits.values())}")
    model.load_state_dict(body, strict=False)
    new_head = "; its classes differ, so the head starts from new weights" if left_out else ""
    logger.info("starting from %s%s", found.file, new_head)
    return digest
