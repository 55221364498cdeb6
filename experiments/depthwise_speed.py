"""Race training with matrix products against training with depthwise convolutions, layer by layer and as whole steps.

    OMP_NUM_THREADS=2 ACCELERATE_USE_CPU=true python -m experiments.depthwise_speed     # three minutes
    python -m experiments.depthwise_speed --gpu                                         # layers of 224 px, on a GPU

Interleaved: each round times every variant once, and the minimum over the rounds counts. `--processor_time` counts the
time of the processors, with one thread, which other work on the machine distorts less. Whole steps are train.py's own
`train_step` on random pixels; layers are a forward and both gradients. The limits of `takes_matmul` in
fmnist/models/matmul_layers.py are read off the table of layers.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fmnist.benchmark.trainer import Trainer
from fmnist.config.parse import parse_config
from fmnist.config.schema import AugmentConfig, BatchConfig, Config, ModelConfig
from fmnist.data.batches import Loader
from fmnist.data.split import Split
from fmnist.models.depthwise import axes, depthwise_matmul
from fmnist.models.matmul_layers import describe_matmul
from fmnist.models.residual import use_lean_residual
from fmnist.runtime.compute import Compute
from fmnist.runtime.files import write_json
from fmnist.runtime.provenance import measured_now, processor

OUTPUT = Path(__file__).parent / "results" / "depthwise_speed.json"
Step = Callable[[], object]
# batch, channels, side of the map, kernel: those of convnext_atto at 32 px, of Lite0 at 64 px, and around the limits
LAYERS = (
    *((256, 40, 8, 7), (256, 80, 4, 7), (256, 160, 2, 7), (256, 320, 1, 7), (32, 40, 8, 7), (128, 48, 12, 7)),
    *((64, 240, 8, 5), (64, 240, 6, 5), (64, 672, 4, 5), (64, 1152, 2, 5)),
    *((64, 240, 8, 3), (64, 480, 4, 3), (64, 480, 3, 3), (64, 1152, 2, 3)),
)
LAYERS_224 = ((256, 768, 7, 7), (256, 384, 14, 7))  # stages 4 and 3 of ConvNeXt-Tiny
ATTO = Config(
    model=ModelConfig(name="convnext_atto"), augment=AugmentConfig(size=32), batch=BatchConfig(global_batch_size=256)
)


def interleaved(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return seconds of one call of each: the lowest of the rounds, after one that is not counted."""
    best = dict.fromkeys(steps, float("inf"))
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            begun = clock()
            step()
            if round_:
                best[name] = min(best[name], clock() - begun)
    return best


def layer_steps(
    batch: int, channels: int, side: int, kernel: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Step]:
    """Return a forward and backward of one layer, as convolution and as product, in both memory formats."""
    steps: dict[str, Step] = {}
    for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        conv = conv.to(device, dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
        images = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        images = images.contiguous(memory_format=memory_format).requires_grad_()
        gradient = torch.randn_like(images)
        lies = axes(conv, (side, side))

        def convolve(conv: nn.Conv2d = conv, images: torch.Tensor = images, g: torch.Tensor = gradient) -> None:
            torch.autograd.grad(conv(images), [images, *conv.parameters()], g)

        def multiply(
            conv: nn.Conv2d = conv, images: torch.Tensor = images, g: torch.Tensor = gradient, lies: Any = lies
        ) -> None:
            convolved = depthwise_matmul(images, conv.weight, conv.bias, *lies)
            torch.autograd.grad(convolved, [images, *conv.parameters()], g)

        steps |= {f"conv {name}": convolve, f"matmul {name}": multiply}
    return steps


def model_steps(cfg: Config, compute: Compute) -> tuple[dict[str, Step], str]:
    """Return an optimizer step with convolutions, one as `auto` chooses, and one that has bf16's residual stream too.

    With them comes what the start line says of `auto`.
    """
    batch, side = cfg.batch.global_batch_size, 28
    images = torch.randint(0, 256, (2 * batch, side, side), dtype=torch.uint8)  # the pixels do not change the time
    loader = Loader(
        Split(images=images, labels=torch.randint(0, 10, (2 * batch,))),
        global_batch_size=batch,
        micro_batch_size=None,
        seed=0,
    )
    batches = loader.micro_batches(0)
    choices: dict[str, Literal["conv", "auto"]] = {"conv": "conv", "auto": "auto", "lean": "auto"}
    steps: dict[str, Step] = {}
    said = ""
    for name, choice in choices.items():
        trainer = Trainer(replace(cfg, model=replace(cfg.model, depthwise=choice, pretrained=False)), compute)
        if name == "lean":
            use_lean_residual(trainer.model)
        steps[name] = lambda trainer=trainer: trainer.train(batches, trainer.augment)  # type: ignore[misc]
        said = describe_matmul(trainer.model, len(trainer.augment.mean), [trainer.augment.final_size])
    return steps, said


def race_cpu(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    recipes = {
        "convnext_atto, 32 px, batch 256": ATTO,
        "convnext_atto with conv_mlp false": replace(ATTO, model=replace(ATTO.model, options={"conv_mlp": False})),
        "configs/convnext_32px.yaml": parse_config(["--config", "configs/convnext_32px.yaml"]),
        "configs/efficientnet_lite0.yaml": parse_config(
            ["--config", "configs/efficientnet_lite0.yaml", "--model.pretrained", "false"]
        ),
        "configs/cnn.yaml": parse_config([]),
    }
    steps: dict[str, Any] = {}
    with Compute(precision="fp32", threads=torch.get_num_threads()) as compute:
        for name, cfg in recipes.items():
            variants, said = model_steps(cfg, compute)
            seconds = interleaved(variants, rounds, clock)
            rate = {choice: cfg.batch.global_batch_size / value for choice, value in seconds.items()}
            steps[name] = {f"{choice}_images_per_second": round(value, 1) for choice, value in rate.items()}
            steps[name] |= {"ratio": round(rate["auto"] / rate["conv"], 2), "auto": said or "convolutions"}
            print(name, steps[name], flush=True)
    return {"steps": steps, "layers": race_layers(LAYERS, torch.device("cpu"), torch.float32, 2 * rounds, clock)}


def race_layers(
    layers: tuple[tuple[int, int, int, int], ...],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    found = {}
    for batch, channels, side, kernel in layers:
        best = interleaved(layer_steps(batch, channels, side, kernel, device, dtype), rounds, clock)
        name = f"{side} x {side} map, {kernel} x {kernel} kernel, {channels} channels, batch {batch}"
        found[name] = {f"{variant} ms": round(1e3 * seconds, 2) for variant, seconds in best.items()}
        print(name, found[name], flush=True)
    return found


def race_gpu(rounds: int) -> dict[str, Any]:
    """Race the small maps of ConvNeXt-Tiny at 224 px in bf16; nothing where there is no accelerator."""
    if not torch.accelerator.is_available():
        print("no GPU here: 7 x 7 and 14 x 14 maps at 224 px are not measured")
        return {}
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")

    def clock() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return {"layers_224_px_bf16": race_layers(LAYERS_224, device, torch.bfloat16, 5 * rounds, clock)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor_time", action="store_true", help="of one thread, for a busy machine")
    parser.add_argument("--gpu", action="store_true", help="the layers of 224 px alone, on a GPU")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if args.processor_time else time.perf_counter
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    if args.gpu:
        measured = race_gpu(args.rounds)
        name = str(torch.cuda.get_device_name()) if measured else ""
    else:
        measured, name = race_cpu(args.rounds, clock), f"{processor()}, {torch.get_num_threads()} threads"
    if not measured:
        return
    about = {
        "command": " ".join(["python -m experiments.depthwise_speed", *sys.argv[1:]]),
        **measured_now(device=name),
        "time": "processor" if args.processor_time and not args.gpu else "wall clock",
        "rounds": args.rounds,
        "load": os.getloadavg()[1],
    }
    result = before | {"gpu" if args.gpu else "cpu": about | measured}
    write_json(args.output, result)


if __name__ == "__main__":
    main()
