"""Recording a CUDA graph, and what stands in the way of one."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]
Record = Callable[[Callable[[], Metrics]], tuple[Callable[[], None], Metrics]]
SYNC = "synchronizing CUDA operation"  # in torch's warning


def record_cuda_graph(action: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
    """Record what a function launches on the current CUDA device, without running it.

    Returns:
        What replays it, and its result, which a replay writes anew.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads save and draw meanwhile
            metrics = action()
    except BaseException:
        torch.cuda.set_stream(stream)  # torch stays in its own where CUDA cannot end a recording
        # a recording that broke leaves the generator waiting for its end; a new state ends that
        device = torch.cuda.current_device()
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(torch.device("cuda", device)))
        raise
    return graph.replay, metrics


@contextmanager
def watched(model: nn.Module, seed: int, device: torch.device, micro_batches: int) -> Iterator[list[str]]:
    """Find out what keeps a step that runs inside from being recorded; the list is filled at the end of the block.

    A graph cannot wait for the device. It would repeat what the host drew or counted when it was recorded, and it draws
    from one seed, where each of several micro-batches has its own. And it keeps its memory: as much has to be left.

    Args:
        model: of the step.
        seed: of the last micro-batch, set before its forward.
        device: of the step.
        micro_batches: of the step.
    """
    obstacles: list[str] = []
    on_cuda, drawn_before, before = device.type == "cuda", _host_draws(), _host_state(model)
    mode = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield obstacles
        finally:
            if on_cuda:
                torch.cuda.set_sync_debug_mode(mode)
    drawn = not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())  # by the host
    on_host = _host_draws() != drawn_before
    if on_cuda:
        on_host, drawn = on_host or drawn, torch.cuda.default_generators[device.index].get_offset() > 0
    for warning in said:  # the others are not ours to keep
        if SYNC not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if any(SYNC in str(warning.message) for warning in said):
        obstacles.append("a step of this model waits for the device")
    if on_host:
        obstacles.append("this model draws random numbers on the host")
    if _host_state(model) != before:
        obstacles.append("this model counts its steps on the host, or puts new tensors in place of its buffers")
    if drawn and micro_batches > 1:
        obstacles.append("this model draws random numbers, anew for each micro-batch")
    if on_cuda:
        needed = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed > torch.cuda.mem_get_info(device)[0]:
            obstacles.append("a graph would keep more of the device's memory than it leaves")


def _host_draws() -> str:
    """Return where the generators stand that Python and NumPy share."""
    shared = np.random.get_state(legacy=False)
    place, keys = shared["state"]["pos"], shared["state"]["key"].tobytes().hex()
    return f"{random.getstate()} {keys} {place} {shared['has_gauss']}"


def _host_state(model: nn.Module) -> list[Any]:
    """Return what a graph holds for constant: the numbers that modules keep, and where parameters and buffers lie."""
    tensors = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    numbers = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    ]
    return [tensors, numbers]
