"""int8: the graph that is written is the one that was measured, and one that loses too much is not written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from small import VAL_SIZE, command, untrained

import fmnist
from fmnist.apps.export import int8
from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.export.expected import Expected
from fmnist.apps.export.int8 import Proof
from fmnist.config.schema import ModelConfig
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split, published
from fmnist.data.info import DATA_FILE

TINY = {"cnn": {"widths": [8, 16, 32]}, "mlp": {"width": 64}}


@pytest.fixture(scope="module", autouse=True)
def quick(small_data: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fmnist.evaluation.cost.SECONDS", 0.05)
        traced: dict[str, Any] = {}
        real = int8.float_graph

        def once(expected: Expected) -> Any:  # torch takes seconds to trace a model
            if expected.trained.digest not in traced:
                proto, seen = real(expected)
                traced[expected.trained.digest] = proto.SerializeToString(), seen
            graph, seen = traced[expected.trained.digest]
            return onnx.load_from_string(graph), seen

        patch.setattr(int8, "float_graph", once)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("int8") / "run", ModelConfig(name="cnn", options=TINY["cnn"]), 28)


def export(run: Path, *args: object, **more: Any) -> str:
    return command(export_main, run, "--to", "onnx", *args, **more)


def about(path: Path) -> dict[str, Any]:
    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["int8"])


def top1(path: Path) -> float:
    images, labels = load_split("val", None, VAL_SIZE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"images": images.numpy()})[0]
    return float((torch.from_numpy(logits).argmax(-1) == labels).double().mean())


@pytest.mark.thorough
def test_the_file_is_what_was_measured_and_the_same_again(run: Path, tmp_path: Path) -> None:
    said = export(run, "--int8", "--max_loss", 1)
    path = run / "export" / "model_int8.onnx"
    assert [file.name for file in path.parent.iterdir()] == ["model_int8.onnx"]
    export(run, "--output", tmp_path / "float.onnx")
    found = about(path)
    assert found["top1_int8"] == top1(path) and found["top1_float"] == top1(tmp_path / "float.onnx")
    assert found["num_images"] == VAL_SIZE and found["kept_float"] == []
    assert 500 * (found["top1_float"] - found["top1_int8"]) == pytest.approx(found["only_float"] - found["only_int8"])
    assert found["mb_float"] == (tmp_path / "float.onnx").stat().st_size / 1e6
    assert (
        f"validation top1 {100 * found['top1_int8']:.2f} %, in float32 {100 * found['top1_float']:.2f} % (500" in said
    )
    assert f"McNemar p {found['p']:.2g}" in said and "ms a picture" in said and "MB, in float32" in said

    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    props = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(props["class_names"]) == list(CLASS_NAMES) and props["run"] == "run"
    whole = graph.SerializeToString().decode("latin-1")
    assert str(ROOT) not in whole and str(run) not in whole  # no path of this machine
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    values = [onnx.numpy_helper.to_array(tensor) for tensor in weights if len(tensor.dims) > 1]
    assert len(values) >= 4 and max(abs(value.astype(int)).max() for value in values) == 127
    assert any(node.op_type == "QuantizeLinear" for node in graph.graph.node)

    export(run, "--int8", "--max_loss", 1, "--output", tmp_path / "again.onnx")
    other = onnx.load(tmp_path / "again.onnx")
    for each in (graph, other):
        del each.metadata_props[:]  # times differ
    assert other.SerializeToString() == graph.SerializeToString()


def test_the_first_and_the_last_layer_stay_in_float(run: Path, tmp_path: Path) -> None:
    flags = ("--keep_float", "first", "last", "--reduce_range")
    said = export(run, "--int8", "--max_loss", 1, *flags, "--output", tmp_path / "kept.onnx")
    kept = about(tmp_path / "kept.onnx")["kept_float"]
    assert len(kept) == 2 and f"in float32: {', '.join(kept)}" in said
    graph = onnx.load(tmp_path / "kept.onnx").graph
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in int8.WEIGHTED]
    plain = [node.name for node in layers if node.input[1] in stored]
    assert plain == kept == [layers[0].name, layers[-1].name]
    ints = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert max(abs(value.astype(int)).max() for value in ints if value.ndim > 1) in (63, 64)  # seven bits
    assert all(made_by[node.input[1]].op_type == "DequantizeLinear" for node in layers[1:-1])


def proof_of(only_float: int, only_int8: int) -> Proof:
    return Proof(
        top1_float=0.93, top1_int8=0.93 - (only_float - only_int8) / 5000, num_images=5000, only_float=only_float,
        only_int8=only_int8, p=0.5, mb_float=1.0, mb_int8=0.3, ms_float=0.3, ms_int8=0.2, ms_float_of_256=0.2,
        ms_int8_of_256=0.1, kept_float=(),
    )  # fmt: skip


def test_what_loses_too_much_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(int8, "prove", lambda *args: proof_of(40, 14))  # 26 of 5,000: 0.0052
    said = export(run, "--int8", "--output", path, status=2)
    assert "int8 takes validation top1 from 0.9300 to 0.9248, which is more than --max_loss 0.005; valid: " in said
    assert "--keep_float first last, or a larger --max_loss" in said and list(tmp_path.iterdir()) == []
    said = export(run, "--int8", "--output", path, "--keep_float", "first", "last", status=2)
    assert said.strip().endswith("valid: a larger --max_loss")
    monkeypatch.setattr(int8, "prove", lambda *args: proof_of(39, 14))  # 25: the limit itself
    export(run, "--int8", "--output", path)
    assert path.is_file()
    monkeypatch.setattr(int8, "prove", lambda *args: proof_of(14, 40))  # a gain
    export(run, "--int8", "--output", path, "--max_loss", 0)


def test_mistakes_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--int8 is of --to onnx" in command(export_main, run, "--to", "hub", "--int8", status=2, lines=None)
    for flags in (("--max_loss", 0.1), ("--keep_float", "last"), ("--reduce_range",)):
        assert f"{flags[0]} has no effect without --int8" in export(run, *flags, status=2, lines=None)
    assert "valid range: 0 to 1" in export(run, "--int8", "--max_loss", 5, status=2, lines=None)
    text = (run / "config.yaml").read_text()
    without = tmp_path / "run"
    without.mkdir()
    (without / "config.yaml").write_text(text.replace(f"val_size: {VAL_SIZE}", "val_size: 0"))
    (without / DATA_FILE).write_text(json.dumps(published(0).to_json()))
    (without / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert "without validation images" in export(without, "--int8", status=2)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", broken)
    assert "onnxruntime cannot quantise the graph: no such" in export(run, "--int8", status=2)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_trained_run_keeps_its_accuracy(name: str, tmp_path: Path) -> None:
    fmnist.train(
        ROOT / "configs" / f"{name}.yaml",
        output_dir=str(tmp_path / "run"),
        data={"val_size": VAL_SIZE},
        model={"name": name, "options": TINY[name]},
        augment={"size": 28},
        schedule={"steps": 60, "warmup_epochs": 0.0},
        evaluation={"test": False, "every_steps": 60},
        optim={"ema_decay": 0.0},
        log={"wandb": "disabled"},
    )
    export(tmp_path / "run", "--int8", "--max_loss", 0.02)  # a percent of 500 images is five
    found = about(tmp_path / "run/export/model_int8.onnx")
    assert found["top1_int8"] > 0.6
    assert found["p"] > 0.01
