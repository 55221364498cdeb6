"""Runs that are repeated, killed, preempted and moved to other process counts end with the same bits.

Rows R1 to R4 of the table in README.md. The starts are forks (see `forks.py`): real processes, real SIGKILLs.
"""

import itertools
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, train
from forks import MOMENTS, NUM_IMAGES, Forks, difference
from safetensors.torch import load_file, save_file

from fmnist.config.parse import load_config
from fmnist.data.fashion_mnist import INFO, load_split
from fmnist.data.split import Split
from fmnist.metrics import predict, score
from fmnist.network import build_network
from fmnist.runtime.compute import Compute

pytestmark = pytest.mark.thorough

STEPS = 24  # three epoch edges (7, 14, 21) and evaluations at 5, 10, 15, 20, 24
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "options": {"width": 64}},
    "cnn": {"name": "cnn", "options": {"widths": [4, 8, 16]}},
    # configs/convnext_32px.yaml, smaller
    "convnext": {
        "name": "convnext_atto",
        "options": {
            "depths": [1, 1, 1, 1],
            "dims": [8, 16, 24, 32],
            "patch_size": 2,
            "conv_mlp": False,
            "ls_init_value": 0.1,
        },
    },
}
Choice = dict[str, Any]
# What can be chosen beside the model: every pair of values occurs in one of the sweep's configs.
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("mlp", "cnn", "convnext"),
    "processes": (1, 2),
    "parts": ("whole", "accumulated", "exact"),
    "mixing": ("none", "mixup", "cutmix", "both"),
    "ema": (False, True),
    "drop": (False, True),  # dropout, and drop path in the ConvNeXt
    "head_only": (False, True),
    "saved_every": (0, 1, 4),  # steps; an evaluation between two saves the weights alone, where they are the best
    "optimizer": ("adamw", "sgd", "muon"),
    "precision": ("fp32", "bf16"),
    "sizes": ("one", "growing"),
    "channels_last": (False, True),
}
PLAIN: Choice = {factor: values[0] for factor, values in FACTORS.items()}


def make_config(choice: Choice) -> dict[str, Any]:
    """The config of a 24-step run on real images: 32 a step, 7 steps an epoch."""
    mixing, size = choice["mixing"], 32 if choice["model"] == "convnext" else 28
    model = MODELS[choice["model"]] | {"precision": choice["precision"], "drop_rate": 0.2 * choice["drop"]}
    model["channels_last"] = choice["channels_last"]
    if choice["model"] == "convnext":
        model["drop_path_rate"] = 0.2 * choice["drop"]
    return {
        "batch": {"global_batch_size": 32, "micro_batch_size": 8 if choice["parts"] == "accumulated" else None},
        "exact": 4 if choice["parts"] == "exact" else None,
        "augment": {
            "size": {"0": size, "1": size + 8} if choice["sizes"] == "growing" else size,
            "rotation": 10,
            "shift": 0.1,
            "erase": 0.25,
            "mixup_alpha": 0.2 * (mixing in ("mixup", "both")),
            "cutmix_alpha": 1.0 * (mixing in ("cutmix", "both")),
        },
        "model": model,
        "optim": {
            "name": choice["optimizer"],
            "lr": 0.05 if choice["optimizer"] == "sgd" else 0.003,
            "ema_decay": 0.9 * choice["ema"],
            "head_only_epochs": 0.5 * choice["head_only"],
            "label_smoothing": 0.1,
            "grad_clip_norm": 1.0,
        },
        "schedule": {"steps": STEPS, "warmup_steps": 2},
        "evaluation": {"every_steps": 5, "batch_size": 40},
        "checkpoint": {"every_steps": choice["saved_every"]},
        "log": {"every_steps": 1, "wandb": "disabled"},
    }


def pairs(choice: Choice) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(choice.items(), 2))


def is_valid(choice: Choice) -> bool:
    return (choice["model"], choice["sizes"]) != ("mlp", "growing")  # its first layer has one image size


def pairwise_cover() -> list[Choice]:
    """Few choices in which every valid pair of values occurs; the same ones each time."""
    chance, cover = random.Random(0), []
    valid = {pair for pair in map(frozenset, all_pairs()) if pair != {("model", "mlp"), ("sizes", "growing")}}
    while valid:
        tries = [{factor: chance.choice(values) for factor, values in FACTORS.items()} for _ in range(300)]
        best = max(filter(is_valid, tries), key=lambda choice: len(valid & set(map(frozenset, pairs(choice)))))
        valid -= set(map(frozenset, pairs(best)))
        cover.append(best)
    return cover


def all_pairs() -> Iterator[tuple[tuple[str, Any], ...]]:
    for one, other in itertools.combinations(FACTORS, 2):
        yield from itertools.product(((one, v) for v in FACTORS[one]), ((other, v) for v in FACTORS[other]))


COVER = pairwise_cover()


def strikes(offset: int) -> list[tuple[int, str]]:
    """Every step, the moments taking turns; besides, two evaluations, their saves, and what follows the last."""
    turns = [(step, MOMENTS[(step + offset) % 4]) for step in range(1, STEPS + 1)]
    beside = [(step, moment) for step in (5, 20, STEPS) for moment in ("copied", "written")]  # saved in every config
    return [*turns, (5, "evaluation"), (STEPS, "evaluation"), *beside, (STEPS, "end"), (STEPS, "exported")]


def kill_and_go_on(
    forks: Forks, folder: Path, choice: Choice, kills: list[tuple[int, str]], processes: int
) -> dict[tuple[int, str], list[str]]:
    """What differs from the unbroken run, by kill; each kill in a run of its own."""
    config = make_config(choice)
    forks.start(folder / "whole", config, processes)
    broken = {}
    for i, (step, moment) in enumerate(kills):
        run = folder / f"{step}_{moment}"
        rank = 0 if moment in ("copied", "written") else i % processes  # the first alone writes
        forks.start(run, config, processes, strike=[step, moment], rank=rank)
        forks.start(run, config, processes)
        if found := difference(run, folder / "whole"):
            broken[step, moment] = found
    return broken


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_three_processes_sum_as_before_after_a_restart(forks: Forks, tmp_path: Path, model: str) -> None:
    """Of two gradients the order of a sum says nothing; of three it depends on where DDP lays them."""
    config = make_config(PLAIN | {"model": model, "ema": True, "drop": True})
    config["batch"] = {"global_batch_size": 48, "micro_batch_size": None}
    if model == "mlp":
        config["model"]["options"] = {"width": 512}  # 2.7 MB of gradients: DDP's first sum alone is of all at once
    forks.start(tmp_path / "whole", config, 3)
    forks.start(tmp_path / "killed", config, 3, strike=[9, "logged"])
    forks.start(tmp_path / "killed", config, 3)
    assert difference(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_the_same_config_twice_gives_the_same_bits(forks: Forks, tmp_path: Path, model: str, processes: int) -> None:
    config = make_config(PLAIN | {"model": model, "mixing": "both", "ema": True, "drop": True})
    for name in ("one", "two"):
        forks.start(tmp_path / name, config, processes)
    assert difference(tmp_path / "one", tmp_path / "two") == []
    logged = metrics(tmp_path / "one")
    assert len(logged) == 24 + 5  # train lines, validations
    forks.start(tmp_path / "other", config | {"seed": 1}, processes)  # the comparison can tell runs apart
    assert {"model.safetensors", "metrics.jsonl"} <= set(difference(tmp_path / "one", tmp_path / "other"))


def test_killed_at_every_step_it_goes_on_to_the_same_bits(forks: Forks, tmp_path: Path) -> None:
    choice = PLAIN | {"model": "cnn", "parts": "accumulated", "mixing": "both", "ema": True, "saved_every": 4}
    choice |= {"optimizer": "muon"}  # which has AdamW for the vectors
    assert kill_and_go_on(forks, tmp_path, choice, strikes(0), 1) == {}


@pytest.mark.parametrize("ema", [False, True])
def test_between_two_full_checkpoints_the_best_weights_are_saved_alone(forks: Forks, tmp_path: Path, ema: bool) -> None:
    """Every 24 steps a full one: killed at any evaluation, the run begins anew, and ends with the same bits."""
    choice = PLAIN | {"model": "mlp", "mixing": "both", "ema": ema, "saved_every": STEPS}
    config = make_config(choice)
    forks.start(tmp_path / "whole", config)
    vals = [(line["step"], line["top1"]) for line in metrics(tmp_path / "whole") if line["prefix"] == "val"]
    best = [step for i, (step, top1) in enumerate(vals) if all(top1 > before for _, before in vals[:i])]
    assert best[0] == 5 and len(best) > 2  # of the evaluations at 5, 10, 15, 20 and 24
    for step in best[:-1]:
        for moment in ("copied", "written", "saved"):
            run = tmp_path / f"{step}_{moment}"
            forks.start(run, config, strike=[step + (moment == "saved"), moment])
            names = sorted(path.name for path in run.glob("checkpoints/[sb]*"))
            before, new = [f"best_{done:08d}" for done in best if done < step][-1:], f"best_{step:08d}"
            # "saved" is a step later: the thread that writes may be anywhere from its first byte to its last deletion
            assert names in ([before, [*before, new], [new]] if moment == "saved" else [before])
            files = {"ema.safetensors" if ema else "model.safetensors", "state.json", "manifest.json"}
            assert all({path.name for path in (run / "checkpoints" / name).iterdir()} == files for name in names)
            forks.start(run, config)
            assert difference(run, tmp_path / "whole") == []


def test_two_processes_killed_go_on_to_the_same_bits(forks: Forks, tmp_path: Path) -> None:
    choice = PLAIN | {"model": "mlp", "parts": "accumulated", "mixing": "both", "ema": True, "saved_every": 1}
    kills = [(1, "micro_batch"), (5, "evaluation"), (7, "saved"), (8, "logged"), (24, "update"), (24, "exported")]
    assert kill_and_go_on(forks, tmp_path, choice, kills, 2) == {}


def test_the_cover_holds_every_pair_of_options() -> None:
    held = set().union(*(pairs(choice) for choice in COVER))
    missing = set(all_pairs()) - held
    assert missing == {(("model", "mlp"), ("sizes", "growing"))}
    assert len(COVER) < 24  # 4 x 3 = 12 at least


def test_a_checkpoint_written_beside_later_steps_holds_the_step_it_was_copied_at(forks: Forks, tmp_path: Path) -> None:
    choice = PLAIN | {"model": "cnn", "mixing": "both", "ema": True}  # saved every fifth step, after the evaluations
    config = make_config(choice) | {"checkpoint": {"keep_last": 10}}
    forks.start(tmp_path / "whole", config)
    forks.start(tmp_path / "slow", config, slow_disk=0.3)
    assert difference(tmp_path / "slow", tmp_path / "whole") == []
    assert len(list(tmp_path.glob("slow/checkpoints/step_*/optimizer.safetensors"))) == 5
    for step, moment in ((10, "copied"), (10, "written")):
        run = tmp_path / moment
        forks.start(run, config, strike=[step, moment])
        assert [path.name for path in run.glob("checkpoints/step_*")] == ["step_00000005"]
        logged = [line["step"] for line in metrics(run) if line["prefix"] == "train"]
        assert max(logged) > step  # it was struck in a later step
        forks.start(run, config)
        assert difference(run, tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 28 kills and as many restarts: half a minute on a quiet machine
@pytest.mark.parametrize("number", range(len(COVER)))
def test_killed_at_every_step_with_every_pair_of_options(forks: Forks, tmp_path: Path, number: int) -> None:
    choice = COVER[number]
    assert kill_and_go_on(forks, tmp_path, choice, strikes(number), choice["processes"]) == {}


def preemptions() -> list[tuple[int, str, int]]:
    """Thirty: one after each step (each fourth by SIGTERM, which saves), four without progress, two after the end."""
    asked = [(step, "update", signal.SIGTERM) for step in range(4, STEPS, 4)]
    killed = [(step, "saved", signal.SIGKILL) for step in range(1, STEPS + 1) if step % 4 or step == STEPS]
    idle = [(step, MOMENTS[i % 3], signal.SIGKILL) for i, step in enumerate((3, 7, 11, 18))]
    late = [(STEPS, "end", signal.SIGKILL), (STEPS, "exported", signal.SIGKILL)]
    return sorted([*asked, *killed, *idle], key=lambda item: (item[0], item[1] == "saved")) + late


@pytest.mark.parametrize("model", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mlp")) for name in MODELS])
def test_thirty_preemptions_give_one_hash(forks: Forks, tmp_path: Path, model: str) -> None:
    config = make_config(PLAIN | {"model": model, "mixing": "both", "ema": True, "drop": True, "saved_every": 1})
    forks.start(tmp_path / "whole", config)
    assert len(preemptions()) == 30  # 5 asked + 19 killed + 4 idle + 2 late
    for step, moment, number in preemptions():
        forks.start(tmp_path / "run", config, strike=[step, moment], signal=int(number))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"  # of the last SIGTERM
    forks.start(tmp_path / "run", config)
    assert difference(tmp_path / "run", tmp_path / "whole") == []


# Processes, and the step at which they are asked to stop; several agree on it after twelve of their steps at most.
ELASTIC = ((4, 6), (2, 7), (1, 20), (4, None))


def move_about(forks: Forks, run: Path, config: dict[str, Any], **job: Any) -> None:
    """Train with 4, 2, 1 and 4 processes; the first change is a kill, the others are asked for."""
    for processes, step in ELASTIC:
        number = signal.SIGKILL if step == 6 else signal.SIGTERM
        more = {} if step is None else {"strike": [step, "update"], "rank": processes - 1, "signal": int(number)}
        forks.start(run, config, processes, **job, **more)
        if number == signal.SIGTERM and step is not None:
            assert json.loads((run / "summary.json").read_text())["stopped_by"] == "SIGTERM"


@pytest.mark.parametrize("model", MODELS)
def test_exact_gives_the_same_bits_through_4_2_1_and_4_processes(forks: Forks, tmp_path: Path, model: str) -> None:
    config = make_config(
        PLAIN
        | {"model": model, "parts": "exact", "mixing": "both", "ema": True, "drop": True, "saved_every": 1}
        | {"precision": "bf16" if model == "convnext" else "fp32"}
    )
    forks.start(tmp_path / "whole", config)
    move_about(forks, tmp_path / "moved", config)
    assert difference(tmp_path / "moved", tmp_path / "whole") == []


def recorded(folder: Path) -> dict[tuple[int, int], set[str]]:
    """Hashes of what was trained on, by step and position in the global batch; more than one if ever it differed."""
    seen: dict[tuple[int, int], set[str]] = {}
    for path in folder.glob("batches.*"):
        for line in path.read_text().splitlines():
            step, position, digest = json.loads(line)
            seen.setdefault((step, position), set()).add(digest)
    return seen


def relative_difference(run: Path, whole: Path) -> float:
    """The L2 norm of the difference of all weights, as a part of the norm of the weights.

    A single weight may differ by more: one that starts at zero has AdamW's step of either sign while its gradient is
    little more than rounding (in bf16 a bias of 0.02 was seen to differ by a tenth of itself).
    """
    one, other = (load_file(path / "checkpoints/step_00000024/model.safetensors") for path in (run, whole))
    squares = torch.stack(
        [torch.stack([(one[key] - other[key]).square().sum(), other[key].square().sum()]) for key in other]
    )
    changed, total = squares.double().sum(0).sqrt().tolist()
    return changed / total


@pytest.mark.parametrize(
    ("model", "precision", "bound"),
    [
        ("mlp", "fp32", 1e-5),
        pytest.param("mlp", "bf16", 2e-2, marks=pytest.mark.slow),
        pytest.param("convnext", "fp32", 1e-5, marks=pytest.mark.slow),
        ("convnext", "bf16", 2e-2),
    ],
)
def test_any_process_count_sees_the_same_batches_and_ends_within_rounding(
    forks: Forks, tmp_path: Path, model: str, precision: str, bound: float
) -> None:
    config = make_config(PLAIN | {"model": model, "mixing": "both", "precision": precision, "saved_every": 1})
    for name in ("whole", "moved"):
        (tmp_path / name).mkdir()
    forks.start(tmp_path / "whole/run", config, record=str(tmp_path / "whole/batches"))
    move_about(forks, tmp_path / "moved/run", config, record=str(tmp_path / "moved/batches"))
    batches = recorded(tmp_path / "whole")
    assert batches.keys() == set(itertools.product(range(STEPS), range(32)))
    assert all(len(hashes) == 1 for hashes in batches.values())
    assert recorded(tmp_path / "moved") == batches
    assert relative_difference(tmp_path / "moved/run", tmp_path / "whole/run") <= bound


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_exact_through_real_launchers_with_4_2_1_and_4_processes(tmp_path: Path, model: str) -> None:
    """As a user does it: torchrun and python, and the time limit as the reason to stop."""
    config = tmp_path / "config.json"  # JSON is YAML
    chosen = make_config(PLAIN | {"model": model, "parts": "exact", "mixing": "both", "ema": True, "drop": True})
    config.write_text(json.dumps(chosen | {"data": {"val_size": 1000}, "schedule": {"steps": 8, "warmup_steps": 2}}))
    train("--config", config, "--output_dir", tmp_path / "whole")
    steps, limit = [], ["--max_minutes", 0.001]
    for processes, more in ((4, limit), (2, limit), (1, limit), (4, [])):
        train("--config", config, "--output_dir", tmp_path / "moved", *more, processes=processes)
        steps.append(json.loads((tmp_path / "moved/summary.json").read_text())["steps"])
    assert steps == [2, 4, 5, 8]  # over at the first step; several processes agree on it at the second
    found = [name for name in difference(tmp_path / "moved", tmp_path / "whole") if name != "summary.json"]
    assert found == []


def first_gradient(forks: Forks, run: Path, choice: Choice, processes: int) -> torch.Tensor:
    """The gradient of the first step, all parameters in one: AdamW's first moment, where beta1 is 0."""
    config = make_config(choice | {"mixing": "both"})
    config["optim"] = {"lr": 0.001, "beta1": 0.0}
    config["schedule"] = {"steps": 1}
    forks.start(run, config, processes)
    state = load_file(run / "checkpoints/step_00000001/optimizer.safetensors")
    return torch.cat([state[key].flatten().double() for key in sorted(state) if key.startswith("exp_avg/")])


@pytest.mark.parametrize("model", ["mlp", "convnext"])
def test_the_first_gradient_of_ddp_is_that_of_one_process(forks: Forks, tmp_path: Path, model: str) -> None:
    choice = PLAIN | {"model": model}
    whole = first_gradient(forks, tmp_path / "whole", choice, 1)
    assert whole.abs().max() > 0.01
    for parts, processes in (("whole", 2), ("whole", 4), ("accumulated", 1), ("accumulated", 2), ("exact", 1)):
        found = first_gradient(forks, tmp_path / f"{parts}_{processes}", choice | {"parts": parts}, processes)
        assert (found - whole).norm() < 1e-6 * whole.norm(), (parts, processes)


def test_two_processes_evaluate_the_weights_and_statistics_that_are_saved(forks: Forks, tmp_path: Path) -> None:
    """Each process has BatchNorm statistics of its own; the main one's are those of the checkpoint."""
    config = make_config(PLAIN | {"model": "cnn"})
    forks.start(tmp_path / "run", config, 2)
    (val,) = (line for line in metrics(tmp_path / "run") if line["prefix"] == "val" and line["step"] == STEPS)
    cfg = load_config(tmp_path / "run/config.yaml")
    compute = Compute(precision=cfg.model.precision, shards=cfg.exact, seed=cfg.seed)
    model, augment = build_network(cfg, INFO, compute.device, load_weights=False)
    model.load_state_dict(load_file(tmp_path / f"run/checkpoints/step_{STEPS:08d}/model.safetensors"))
    images, labels = (tensor[: NUM_IMAGES["val"]].to(compute.device) for tensor in load_split("val", None, 5000))
    scores = score(predict(model, Split(images=images, labels=labels), augment, cfg.evaluation, compute), labels)
    assert float(scores["loss"]) == pytest.approx(val["loss"], abs=1e-6)
    assert float(scores["top1"]) == val["top1"]


def test_training_time_adds_up_over_starts(forks: Forks, tmp_path: Path) -> None:
    config = make_config(PLAIN | {"saved_every": 1})
    forks.start(tmp_path / "run", config, strike=[20, "update"], signal=int(signal.SIGTERM))
    (state,) = (tmp_path / "run").glob("checkpoints/step_00000020/state.json")
    spent = json.loads(state.read_text())["train_seconds"]
    forks.start(tmp_path / "run", config, strike=[22, "saved"])
    continued = json.loads((tmp_path / "run/checkpoints/step_00000021/state.json").read_text())["train_seconds"]
    assert 0 < spent < continued  # one step alone takes less than the twenty-one


def test_the_relative_difference_by_hand(tmp_path: Path) -> None:
    for name, value in (("one", 3.5), ("other", 3.0)):
        folder = tmp_path / name / "checkpoints/step_00000024"
        folder.mkdir(parents=True)
        save_file({"w": torch.tensor([value]), "b": torch.tensor([-4.0])}, folder / "model.safetensors")
    assert relative_difference(tmp_path / "one", tmp_path / "other") == pytest.approx(0.1)  # 0.5 of sqrt(9 + 16) = 5
