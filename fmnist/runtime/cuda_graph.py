"""Recording a CUDA graph, and what stands in the way of one."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
Record = Callable[[Callable[[], Metrics]], tuple[Callable[[], None], Metrics]]
SYNC = "synchronizing CUDA operation"  # in torch's warning


def record_cuda_graph(action: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
    """Record what a function launches on the current CUDA device, without running it.

    Returns:
        What replays it, and its result, which a replay writes anew.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads save and draw meanwhile
            metrics = action()
    except Exception:
        # a recording that broke leaves the generator waiting for its end; a new state ends that
        device = torch.cuda.current_device()
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(torch.device("cuda", device)))
        raise
    return graph.replay, metrics


@contextmanager
def watched(seed: int, device: torch.device, micro_batches: int) -> Iterator[list[str]]:
    """Find out what keeps a step that runs inside from being recorded; the list is filled at the end of the block.

    A graph cannot wait for the device. It would repeat what the host drew when it was recorded, and it draws from one
    seed, where each of several micro-batches has its own. And it keeps its memory: as much has to be left.

    Args:
        seed: of the last micro-batch, set before its forward.
        device: of the step.
        micro_batches: of the step.
    """
    obstacles: list[str] = []
    on_cuda, before = device.type == "cuda", random.getstate()
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
    on_host = random.getstate() != before
    if on_cuda:
        on_host, drawn = on_host or drawn, torch.cuda.default_generators[device.index].get_offset() > 0
    if any(SYNC in str(warning.message) for warning in said):
        obstacles.append("a step of this model waits for the device")
    if on_host:
        obstacles.append("this model draws random numbers on the host")
    if drawn and micro_batches > 1:
        obstacles.append("this model draws random numbers, anew for each micro-batch")
    if on_cuda:
        needed = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed > torch.cuda.mem_get_info(device)[0]:
            obstacles.append("a graph would keep more of the device's memory than it leaves")
