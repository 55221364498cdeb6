"""What is exported gives the run's numbers, in the hands of programs that know nothing of this project."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from other_sets import untrained_on, write_npz
from safetensors.torch import load_file, save_file
from small import VAL_SIZE, command, untrained

from fmnist.apps.export import hub
from fmnist.apps.export.__main__ import main as export_main
from fmnist.apps.export.expected import Expected, _check_metrics, open_expected
from fmnist.apps.export.hub import _portable_config, write_hub
from fmnist.apps.export.model_card import escape, own_licence
from fmnist.apps.export.onnx import check, write_onnx
from fmnist.apps.export.preprocess import means
from fmnist.config.schema import ModelConfig
from fmnist.data.augment import with_channels
from fmnist.data.fashion_mnist import CLASS_NAMES, load_split
from fmnist.data.pyramid import shrink
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Outcome
from fmnist.report.write import write_evaluation
from fmnist.runtime.files import sha256_of
from fmnist.trained import open_trained

TINY_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2, "conv_mlp": False}
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


pytestmark = pytest.mark.usefixtures("small_data")


@pytest.fixture(scope="module")
def cnn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ModelConfig(name="cnn", options={"widths": [8, 16, 32]}, channels_last=True)
    return evaluated(untrained(tmp_path_factory.mktemp("export") / "run", model, 28))


def evaluated(run: Path, flip: bool = False) -> Path:
    """Give a run directory the evaluation on the test images that evaluate.py would."""
    trained = open_trained(run, "cpu")
    split = trained.split("test")
    images, labels = split.images, split.labels
    logits, _ = trained(images)
    if flip:
        logits = ((logits.softmax(-1) + trained(images.flip(-1))[0].softmax(-1)) / 2).clamp(min=1e-30).log()
    outcome = Outcome(
        name="run",
        model=trained.cfg.model.name,
        directory=run / "evaluation" / "test",
        split="test",
        tta="flip" if flip else "none",
        images=images,
        labels=labels,
        logits=logits,
        class_names=trained.class_names,
        weights_sha256=trained.digest,
    )
    write_evaluation(findings(outcome, quick=True))
    return run


def export(*args: object, status: int = 0) -> str:
    return command(export_main, *args, status=status)


MODELS = [
    (ModelConfig(name="mlp", options={"width": 32}), 28),
    (ModelConfig(name="mlp", options={"width": 32}), 12),  # shrunk by more than 2: means of pixels are in the graph
    (ModelConfig(name="convnext_atto", options=TINY_CONVNEXT), 32),
    pytest.param(ModelConfig(name="tf_efficientnet_lite0", pretrained=True), 64, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="convnext_atto", pretrained=True), 64, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="vit_tiny_patch16_224", options=TINY_VIT), 64, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="vit_tiny_patch16_224", pretrained=True), 224, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="resnet18", pretrained=True), 64, marks=pytest.mark.slow),  # keeps three channels
]


@pytest.mark.parametrize(("model", "size"), MODELS, ids=lambda value: getattr(value, "name", None))
def test_onnx_gives_the_logits_of_torch(model: ModelConfig, size: int, tmp_path: Path) -> None:
    expected = few(open_expected(untrained(tmp_path / "run", model, size)), 1000 if size < 100 else 40)
    assert f"{len(expected.images):,} test images" in write_onnx(expected, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(None, {"images": expected.images[:5].numpy()})
    largest = float(expected.logits.abs().max())
    assert np.abs(logits - expected.logits[:5].numpy()).max() < 1e-4 * max(1, largest / 10)
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5
    assert expected.logits.std(dim=0).max() > 1e-3  # images are told apart: equal logits would say nothing


def few(expected: Expected, count: int) -> Expected:
    return replace(expected, images=expected.images[:count], logits=expected.logits[:count])


def test_onnx_of_a_trained_cnn(cnn_run: Path) -> None:
    assert "the largest difference from torch" in export(cnn_run, "--to", "onnx")
    path = cnn_run / "export" / "model.onnx"
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    (taken,) = proto.graph.input
    assert taken.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = taken.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch" and [dim.dim_value for dim in dims[1:]] == [28, 28]
    assert [output.name for output in proto.graph.output] == ["logits", "probabilities"]
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["class_names"]) == list(CLASS_NAMES)
    assert (about["run"], about["weights_sha256"]) == ("run", sha256_of(cnn_run / "model.safetensors"))
    assert str(ROOT) not in proto.SerializeToString().decode("latin-1")  # no path of this machine in the file

    images = load_split("test", None, VAL_SIZE)[0][1000:]  # not those that the export itself looked at
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert torch.allclose(logits, open_trained(cnn_run, "cpu")(images)[0], atol=1e-4)


def test_a_graph_that_differs_leaves_no_file(cnn_run: Path, tmp_path: Path) -> None:
    expected = open_expected(cnn_run)
    other = replace(expected, logits=expected.logits + 2e-4)
    with pytest.raises(ValueError, match="logits differ from torch's by 2.0e-04; the limit is 1e-04"):
        write_onnx(other, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    nan = replace(expected, logits=expected.logits * torch.nan)
    write_onnx(expected, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="differ"):
        check(tmp_path / "model.onnx", nan)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="onnxruntime cannot run the graph"):
        check(tmp_path / "cut.onnx", expected)


def test_a_missing_package_is_one_line(cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ValueError, match="needs onnxscript: pip install -r requirements-export.txt"):
        write_onnx(open_expected(cnn_run), tmp_path / "model.onnx")


def card_logits(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Run the card's own Python as its reader would."""
    text = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    names: dict[str, object] = {}
    exec(code[0].replace("FOLDER", str(folder)), names)
    return names["logits"](images)  # type: ignore[operator]


def test_hub_folder_of_our_own_model(cnn_run: Path) -> None:
    assert "gives the run's logits" in export(cnn_run, "--to", "hub")
    folder = cnn_run / "export" / "hub"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "config.yaml", "data.json", "model.safetensors"),
    ]
    images = load_split("test", None, VAL_SIZE)[0][:100]
    assert torch.allclose(card_logits(folder, images), open_trained(cnn_run, "cpu")(images)[0], atol=1e-5)
    card = (folder / "README.md").read_text()
    metrics = json.loads((cnn_run / "evaluation" / "test" / "metrics.json").read_text())
    assert f"accuracy **{100 * metrics['top1']:.2f} %**" in card and f"error {metrics['ece']:.4f}" in card
    assert f"| Shirt | {metrics['per_class']['Shirt']['precision']:.4f} |" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "fmnist" and head["license"] == "mit"
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == metrics["top1"]
    assert "timm does not know this model" in card
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    for name in ("README.md", "config.json", "config.yaml"):  # nothing of the machine goes to a hub
        assert str(cnn_run.parent) not in (folder / name).read_text()


HUB_MODELS = [
    (ModelConfig(name="convnext_atto", options=TINY_CONVNEXT), 32, 1),
    pytest.param(ModelConfig(name="tf_efficientnet_lite0", pretrained=True), 64, 1, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="convnext_atto", pretrained=True), 64, 1, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="vit_tiny_patch16_224", options=TINY_VIT), 64, 1, marks=pytest.mark.slow),
    pytest.param(ModelConfig(name="resnet18", pretrained=True), 64, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "size", "num_channels"), HUB_MODELS, ids=lambda value: getattr(value, "name", None))
def test_timm_opens_the_hub_folder(model: ModelConfig, size: int, num_channels: int, tmp_path: Path) -> None:
    run = evaluated(untrained(tmp_path / "run", model, size))
    write_hub(open_expected(run), tmp_path / "hub")
    opened = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    prepared = timm.data.resolve_data_config(model=opened)
    trained = open_trained(run, "cpu")
    assert tuple(prepared["input_size"]) == (num_channels, size, size)
    assert prepared["mean"] == pytest.approx(trained.augment.mean)
    assert prepared["std"] == pytest.approx(trained.augment.std)
    assert opened.pretrained_cfg["label_names"] == list(CLASS_NAMES)
    images = load_split("test", None, VAL_SIZE)[0][1000:1050]
    logits = trained(images)[0]
    with torch.no_grad():
        direct = opened(trained.augment.evaluation(images, size))
    limit = 1e-5 * max(1.0, float(logits.abs().max()) / 10)
    assert (direct - logits).abs().max() < limit
    assert (card_logits(tmp_path / "hub", images) - logits).abs().max() < limit
    # The folder is a run too, as config.yaml says.
    assert torch.equal(open_trained(tmp_path / "hub", "cpu")(images)[0], logits)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("shape", [(16, 16), (31, 20), (37, 50), (9, 300)], ids=str)
def test_the_cards_means_are_the_pyramids(shape: tuple[int, int], level: int) -> None:
    images = torch.randint(0, 256, (3, 2, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images[0] &= 1  # zeros and ones: many means lie halfway
    assert torch.equal(means(images, level), shrink(images, level).float())


@pytest.mark.thorough
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
@pytest.mark.parametrize(("shape", "size", "level"), [((64, 64), 32, 1), ((64, 64), 16, 2), ((50, 74), 24, 1)], ids=str)
def test_a_hub_folder_of_a_run_that_shrinks_its_images(
    colour: bool, shape: tuple[int, int], size: int, level: int, tmp_path: Path
) -> None:
    npz = write_npz(tmp_path / "images.npz", 5, (*shape, 3) if colour else shape)
    run = untrained_on(
        npz, tmp_path / "run", size, ModelConfig(name="convnext_atto", options=TINY_CONVNEXT | {"patch_size": 1})
    )
    expected = open_expected(evaluated(run))
    write_hub(expected, tmp_path / "hub")
    card = (tmp_path / "hub/README.md").read_text()
    assert f", {level}) / 255" in card and "def means" in card
    remarks = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).pretrained_cfg["notes"]
    assert any(f"averaged over {2**level} x {2**level} pixels" in remark for remark in remarks)
    limit = 1e-5 * max(1.0, float(expected.logits.abs().max()) / 10)
    assert (card_logits(tmp_path / "hub", expected.images) - expected.logits).abs().max() < limit
    # what a plain resize gives is something else: the check would have refused the folder
    augment = expected.trained.augment
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.mean, augment.std))
    plain = F.interpolate(with_channels(expected.images).float() / 255, (size, size), mode="bilinear")
    assert (expected.trained.model((plain - mean) / std) - expected.logits).abs().max() > 10 * limit
    if (size, level) == (16, 2):
        assert "the largest difference" in write_onnx(expected, tmp_path / "model.onnx")


def test_a_folder_that_is_half_replaced_is_opened_by_nobody(
    cnn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real, written = tmp_path / "hub", hub.write_atomic, []
    write_hub(open_expected(cnn_run), folder)
    assert open_trained(folder, "cpu").class_names

    def full_disk(path: Path, content: bytes) -> None:
        written.append(path.name)
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(hub, "write_atomic", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_hub(open_expected(cnn_run), folder)
    assert not {"config.json", "config.yaml"} & {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"not a run directory of train\.py"):
        open_trained(folder, "cpu")


def test_a_card_needs_figures_of_these_weights(cnn_run: Path, tmp_path: Path) -> None:
    run = untrained(tmp_path / "run", ModelConfig(name="mlp", options={"width": 16}), 28)
    assert "measured figures, and there is no" in export(run, "--to", "hub", status=2)
    shutil.copytree(cnn_run / "evaluation", run / "evaluation")  # those of another run
    assert "was evaluated with other weights; run: fmnist evaluate" in export(run, "--to", "hub", status=2)
    # of weights that answer almost alike, too: a mean over many classes' probabilities cannot tell them apart
    evaluated(run)
    tensors = load_file(run / "model.safetensors")
    bias = next(name for name in tensors if name.endswith("bias"))
    save_file(tensors | {bias: tensors[bias] + 1e-6}, run / "model.safetensors")
    assert "was evaluated with other weights; run: fmnist evaluate" in export(run, "--to", "hub", status=2)
    path = run / "evaluation" / "test" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in metrics.items() if key != "weights_sha256"}))
    said = "does not say which weights it is of, as of an older version; run: fmnist evaluate"
    assert said in export(run, "--to", "hub", status=2)
    assert not (run / "export" / "hub").exists()
    assert list((run / "export").iterdir()) == [] if (run / "export").exists() else True


def test_flip_averaged_figures_are_said_to_be_so(cnn_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "data.json", "model.safetensors"):
        (run / name).write_bytes((cnn_run / name).read_bytes())
    export(evaluated(run, flip=True), "--to", "hub")
    assert "each image averaged with its mirror" in (run / "export" / "hub" / "README.md").read_text()
    export(evaluated(run), "--to", "hub")
    assert "averaged with its mirror" not in (run / "export" / "hub" / "README.md").read_text()


def test_weights_that_began_from_another_run_have_no_licence_of_their_own(cnn_run: Path) -> None:
    trained = open_expected(cnn_run).trained
    assert own_licence(trained) == "mit"
    cfg = replace(trained.cfg, model=replace(trained.cfg.model, weights="runs/from_imagenet"))
    assert own_licence(replace(trained, cfg=cfg)) == "other"
    cfg = replace(cfg, data=replace(cfg.data, root="/home/anna", corrections="/home/anna/audit.csv"))
    assert "anna" not in _portable_config(replace(trained, cfg=cfg))


def test_a_class_without_test_images_has_no_ratios_and_a_card_all_the_same() -> None:
    whole = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 3}
    none = {"precision": None, "recall": 0.0, "f1": None, "support": 0}
    metrics = {"top1": 0.5, "loss": 1.0, "ece": 0.1, "num_images": 3, "top1_interval": [0.1, 0.9]}
    _check_metrics(metrics | {"per_class": {"a": whole, "b": none}})
    for wrong in (
        {"loss": None},
        {"per_class": {"a": whole | {"support": None}}},
        {"per_class": {"a": {"support": 3}}},
    ):
        with pytest.raises((ValueError, KeyError)):
            _check_metrics(metrics | {"per_class": {"a": whole}} | wrong)


def test_names_are_escaped() -> None:
    assert escape("a|b") == "a\\|b"
    assert escape("<script>alert(1)</script>") == "&lt;script&gt;alert\\(1\\)&lt;/script&gt;"
    assert escape("x\n# y [z](w)") == "x \\# y \\[z\\]\\(w\\)"


def test_mistakes_are_one_line(cnn_run: Path, tmp_path: Path) -> None:
    assert "not a run directory" in export("tests", "--to", "onnx", status=2)
    (tmp_path / "file").write_text("")
    assert "is a file" in export(cnn_run, "--to", "hub", "--output", tmp_path / "file", status=2)
