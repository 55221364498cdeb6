"""docs/serve.md: its program, as it stands there, answers real requests; and the table of calibration errors."""

import http.client
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from pictures import learned_run
from PIL import Image, ImageDraw

from experiments import calibration_rates
from fmnist.apps.export.expected import open_expected
from fmnist.apps.export.onnx import write_onnx
from fmnist.apps.views import view_of
from fmnist.data.photos import as_rgb
from fmnist.evaluation.numbers import calibration_error
from fmnist.trained import Trained

PAGE = (ROOT / "docs/serve.md").read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trained, str]]:
    """A trained run, and the address at which the page's program serves it."""
    folder = tmp_path_factory.mktemp("serve")
    expected = open_expected(learned_run(tmp_path_factory))
    write_onnx(replace(expected, images=expected.images[:40], logits=expected.logits[:40]), folder / "model.onnx")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "serve.py").write_text(program)
    command = [sys.executable, "serve.py", "model.onnx", "0"]
    server = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield expected.trained, server.stdout.readline().strip()
    finally:
        server.terminate()
        server.communicate()


def ask(address: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("POST", "/", body, headers or {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.thorough
def test_the_pages_program_answers_as_the_run_does(served: tuple[Trained, str]) -> None:
    trained, address = served
    shirt = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(shirt).polygon([(100, 60), (220, 60), (270, 120), (220, 130), (220, 220), (100, 220)], fill="navy")
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        shirt.save(file, kind)
        status, said = ask(address, file.getvalue())
        seen = view_of(as_rgb(Image.open(file)), trained.info).view
        logits, _ = trained(torch.from_numpy(seen)[None])
        (expected,) = trained.probabilities(logits).tolist()
        assert status == 200 and trained.temperature != 1
        assert list(said["probabilities"]) == list(trained.class_names)
        assert list(said["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
        assert said["prediction"] == trained.class_names[int(np.argmax(expected))]
        assert said["confidence"] == max(said["probabilities"].values())


@pytest.mark.thorough
def test_the_pages_program_refuses_what_is_no_picture_and_goes_on(served: tuple[Trained, str]) -> None:
    _, address = served
    assert ask(address, b"no picture") == (400, {"error": "no picture that can be read: UnidentifiedImageError"})
    assert ask(address, b"")[0] == 400
    assert ask(address, b"", {"Content-Length": "99999999999"})[0] == 413
    assert ask(address, b"", {"Content-Length": "-1"})[0] == 413
    assert ask(address, b"no picture")[0] == 400


def test_the_calibration_error_of_the_table_is_that_of_the_report() -> None:
    probabilities = torch.rand(1000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    labels = torch.arange(1000) % 10
    confidence, classes = probabilities.max(dim=1)
    by_hand = calibration_rates.error_of(confidence.numpy(), (classes == labels).numpy())
    assert by_hand == pytest.approx(calibration_error(probabilities, labels), abs=1e-12)
    assert calibration_rates.error_of(
        np.array([0.9, 0.9, 0.5, 1.0]), np.array([True, False, True, True])
    ) == pytest.approx((2 * 0.4 + 0.5 + 0) / 4)


@pytest.mark.thorough
def test_predict_and_the_graph_have_one_calibration_error(served: tuple[Trained, str]) -> None:
    (_, *by_predict), (_, *by_graph) = calibration_rates.rows(str(served[0].directory), 200)
    assert by_predict == pytest.approx(by_graph, abs=1e-3)
    assert 0 < by_predict[1] != by_predict[0]
