"""The schedule by hand, and parameter groups on real models."""

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmnist.config.schema import Config, OptimConfig, ScheduleConfig
from fmnist.models.cnn import Cnn
from fmnist.models.head import head_parameters
from fmnist.models.mlp import Mlp
from fmnist.optim import Schedule, build_optimizer, parameter_groups, set_lr
from fmnist.runtime.muon import orthogonalize


def schedule(**kwargs: object) -> Schedule:
    cfg = replace(Config(), optim=OptimConfig(lr=1.0, head_only_epochs=0.5), schedule=ScheduleConfig(**kwargs))
    return Schedule.from_config(cfg, steps_per_epoch=10)


def test_cosine_with_warm_up_at_hand_computed_steps() -> None:
    s = schedule(epochs=12, warmup_epochs=2, min_lr=0.1)
    assert (s.total_steps, s.warmup_steps, s.evaluation_steps, s.head_only_steps) == (120, 20, 10, 5)
    assert s.lr(0) == pytest.approx(1 / 20)
    assert s.lr(19) == pytest.approx(1.0)
    assert s.lr(20) == pytest.approx(1.0)
    assert s.lr(70) == pytest.approx(0.55)  # half of the 100 steps: 0.1 + 0.9 / 2
    assert s.lr(45) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert s.lr(119) == pytest.approx(0.1, abs=1e-3)


def test_linear_constant_and_durations_in_steps() -> None:
    assert schedule(epochs=10, name="linear").lr(25) == pytest.approx(0.75)
    assert schedule(epochs=10, name="constant").lr(99) == 1.0
    s = schedule(epochs=10, steps=7, warmup_epochs=9, warmup_steps=2)
    assert (s.total_steps, s.warmup_steps) == (7, 2)
    assert s.epoch(15) == 1.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"epochs": 1, "warmup_steps": 10}, "warmup_steps is 10, but the run has 10"), ({"min_lr": 2.0}, "min_lr is 2.0")],
)
def test_a_schedule_that_cannot_be_is_refused(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**kwargs)


def test_a_run_has_no_more_steps_than_the_names_of_checkpoints_have_digits_for() -> None:
    with pytest.raises(ValueError, match=r"schedule.epochs 100000 are 107,100,000 steps; valid: at most 99,999,999"):
        Schedule.from_config(Config(schedule=ScheduleConfig(epochs=100_000)), 1071)


def test_what_is_due_is_due_at_its_period_and_at_the_end() -> None:
    s = replace(schedule(steps=10), log_steps=4, evaluation_steps=5, checkpoint_steps=3)
    steps = range(1, 11)
    assert [step for step in steps if s.logs(step)] == [4, 8, 10]
    assert [step for step in steps if s.validates(step)] == [5, 10]
    assert [step for step in steps if s.saves(step)] == [3, 6, 9, 10]
    with_validation = replace(s, checkpoint_steps=0)
    assert [step for step in steps if with_validation.saves(step)] == [5, 10]


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "cnn"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_every_parameter_is_in_one_group_and_vectors_have_no_decay(name: str, layer_decay: float | None) -> None:
    model = Cnn(10) if name == "cnn" else timm.create_model(name, num_classes=10)
    cfg = OptimConfig(layer_decay=layer_decay, weight_decay=0.05, head_lr_scale=5.0)
    if name == "cnn" and layer_decay:
        with pytest.raises(ValueError, match=r"optim.layer_decay is 0.75"):
            parameter_groups(model, cfg)
        return
    groups = parameter_groups(model, cfg)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert p.ndim > 1 or group["weight_decay"] == 0
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(head_parameters(model)[0])] == 5.0  # the head has no layer below it: 1 * head_lr_scale
    if layer_decay:
        body = [scale for scale in scales.values() if scale != 5.0]
        assert min(body) < 0.2
        assert all(math.isclose(math.log(s, 0.75), round(math.log(s, 0.75)), abs_tol=1e-6) for s in body)


def test_only_the_head_moves_in_head_only_steps() -> None:
    torch.manual_seed(0)
    model = Cnn(10, widths=(4, 8))
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, head_lr_scale=2.0))
    s = schedule(epochs=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set_lr(optimizer, s, 4) == s.lr(4)
    model(torch.randn(8, 1, 28, 28)).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.weight", "head.bias"}
    set_lr(optimizer, s, 5)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_the_optimizers_are_fused_and_learn(name: str) -> None:
    torch.manual_seed(0)
    model = Mlp(2, image_size=2, width=8)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))
    assert optimizer.defaults["fused"]
    images, labels = torch.randn(64, 1, 2, 2), torch.arange(64) % 2
    images[:, 0, 0, 0] += labels * 4.0
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


class Launches(TorchDispatchMode):
    """Count operations as they are dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def test_adamw_has_torchs_bits_in_one_launch_for_each_learning_rate_and_decay() -> None:
    cfg = OptimConfig(lr=0.01, layer_decay=0.75, weight_decay=0.05, head_lr_scale=5.0)
    torch.manual_seed(0)
    models = [timm.create_model("convnext_atto", num_classes=10, in_chans=1)]
    models.append(copy.deepcopy(models[0]))
    ours = build_optimizer(models[0], cfg)
    theirs = torch.optim.AdamW(parameter_groups(models[1], cfg), lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    s = replace(schedule(epochs=2), peak_lr=0.01)
    for step in range(3, 8):  # 3 and 4: only the head moves
        for optimizer in (ours, theirs):
            set_lr(optimizer, s, step)
            generator = torch.Generator().manual_seed(step)
            for p in models[optimizer is theirs].parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        if step < 6:
            models[0].stem[0].bias.grad = models[1].stem[0].bias.grad = None  # one is left out, and comes later
        if step == 7:  # a restart
            for optimizer in (ours, theirs):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with Launches() as launches:
            ours.step()
        theirs.step()
        kinds = len({(group["lr"], group["weight_decay"]) for group in ours.param_groups})
        fused = launches.counts["aten::_fused_adamw_"], launches.counts["aten::_foreach_add_"]
        assert fused == (kinds, 1) and kinds == (4 if step < 5 else len(ours.param_groups))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    state = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    for number in state[1]:
        assert all(torch.equal(state[0][number][key], value) for key, value in state[1][number].items())
    assert state[0].keys() == state[1].keys()


def test_muon_takes_hidden_filters_and_adamw_the_rest() -> None:
    model = timm.create_model("convnext_atto", num_classes=10, in_chans=1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(name="muon"))
    by_muon = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    # Of a block the two linear layers; not its depthwise kernels [C, 1, 7, 7], its vectors, the stem's [C, 1, 4, 4].
    assert {name for name in by_muon if "stages.0.blocks.0" in name} == {
        "stages.0.blocks.0.mlp.fc1.weight",
        "stages.0.blocks.0.mlp.fc2.weight",
    }
    assert "stages.1.downsample.1.weight" in by_muon
    assert not any(name.startswith(("stem", "head")) for name in by_muon)
    assert not any(group["muon"] for group in parameter_groups(model, OptimConfig(name="adamw")))


def test_muon_leaves_tables_of_position_biases_to_adamw() -> None:
    model = timm.create_model("levit_128s", num_classes=10, in_chans=1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(name="muon"))
    by_muon = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    tables = {name for name in names.values() if name.endswith("attention_biases")}
    assert tables and not tables & by_muon and any(name.endswith("qkv.linear.weight") for name in by_muon)


@pytest.mark.parametrize("shape", [(64, 288), (96, 32), (40, 40)])
def test_an_orthogonalized_matrix_keeps_its_directions_with_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    ours = (left.T @ result @ right.T).diagonal()  # what became of each singular value
    assert torch.allclose(result, left @ ours.diag() @ right, atol=1e-4)
    assert values.max() / values.min() > 2
    strong = ours[values > 0.02 * values.norm()]
    assert strong.min() > 0.65 and strong.max() < 1.25


def test_a_step_of_muon_by_hand() -> None:
    torch.manual_seed(0)
    model = Cnn(10, widths=(4, 8))
    cfg = OptimConfig(name="muon", lr=0.01, weight_decay=0.1, beta1=0.8)
    optimizer, same = build_optimizer(model, cfg), build_optimizer(model, replace(cfg, name="adamw"))
    filters = model.stages[0][1][0].weight  # [8, 4, 3, 3]: a matrix of 8 x 36
    before, gradients = filters.detach().clone(), [torch.randn(8, 4, 3, 3) for _ in range(2)]
    wanted, buffer = before.clone(), torch.zeros_like(before)
    for gradient in gradients:
        filters.grad = gradient
        optimizer.step()
        buffer = 0.8 * buffer + 0.2 * gradient
        direction = orthogonalize((0.2 * gradient + 0.8 * buffer).flatten(1)).view(8, 4, 3, 3)
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(36) * direction
    assert torch.allclose(filters, wanted, atol=1e-6)

    head = model.head.weight
    start, gradient = head.detach().clone(), torch.randn_like(head)
    ends = []
    for each in (optimizer, same):
        head.data.copy_(start)
        filters.grad, head.grad = None, gradient
        each.step()
        ends.append(head.detach().clone())
    assert torch.equal(*ends)
