"""Device memory of a run: what stays in it, and what activations take."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from fmnist.checkpoint.tensors import expected_state
from fmnist.data.augment import Augment
from fmnist.runtime.gradients import as_it_was
from fmnist.runtime.hardware import autocast


def memory_bytes(model: nn.Module, data_bytes: int, optimizer: Optimizer, *, ema: bool) -> dict[str, int]:
    """Return the device memory of what stays for the whole run; activations come on top.

    Args:
        model: the network, fp32.
        data_bytes: of the images and labels that are kept on the device.
        optimizer: of its parameters.
        ema: a moving average of the weights is kept.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(
        len(expected_state(optimizer, group) - {"step"}) * p.numel() * p.element_size()
        for group in optimizer.param_groups
        for p in group["params"]
    )
    return {
        "data": data_bytes,
        "weights": weights,
        "gradients": weights,
        "optimizer": moments,
        "ema": weights if ema else 0,
    }


def activation_bytes(model: nn.Module, augment: Augment, size: int, num_images: int) -> int:
    """Estimate what a forward keeps for its backward, from two small ones: what is not of an image is counted once.

    Args:
        model: in training mode; it is not changed.
        augment: gives channels and the dtype of the arithmetic.
        size: pixels per side.
        num_images: of the micro-batch.
    """
    device = next(model.parameters()).device
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept(count: int) -> int:
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.zeros(count, len(augment.mean), size, size, device=device)
        with saved_tensors_hooks(note, lambda tensor: tensor), autocast(device, augment.dtype):
            model(images).float().logsumexp(-1).sum()
        return sum(found.values())

    with as_it_was(model):
        two, four = kept(2), kept(4)
    each = (four - two) / 2
    return round(two - 2 * each + num_images * each)
