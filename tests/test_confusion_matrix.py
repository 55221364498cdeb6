"""The confusion matrix of report.html: the images of every cell, by mouse and by keys in a real browser."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Tab, browser_tab
from PIL import Image
from test_many_classes import outcome_of

from fmnist.data.fashion_mnist import CLASS_NAMES, load
from fmnist.evaluation.cells import matrix_cells
from fmnist.evaluation.findings import findings
from fmnist.evaluation.outcome import Outcome
from fmnist.report.matrix import CHOICES, cell_images, matrix_rows
from fmnist.report.page import context, render, write_html
from fmnist.report.page_figures import sheet

SHIRT, TOP, BAG = 6, 0, 8
NUM_CONFUSED = 70


def probability(logit: float, num_classes: int = 10) -> float:
    """Of the class with that logit, where the others have 0."""
    return float(torch.tensor([logit] + [0.0] * (num_classes - 1)).double().softmax(0)[0])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The first 1,000 test images: the first 70 shirts are taken for T-shirts, the later the surer, one for a bag."""
    images, labels = (part[:1000] for part in load("test"))
    logits = 4.0 * torch.nn.functional.one_hot(labels, 10)
    shirts = (labels == SHIRT).nonzero().flatten()
    for place, position in enumerate(shirts[:NUM_CONFUSED].tolist()):
        logits[position] = 0.0
        logits[position, TOP] = 1.0 + place / 20
    logits[shirts[NUM_CONFUSED]] = 5.0 * torch.nn.functional.one_hot(torch.tensor(BAG), 10)
    logits[shirts[NUM_CONFUSED + 1], SHIRT] = 2.0  # right, and less sure than the other shirts
    base = outcome_of(10, tmp_path_factory.mktemp("matrix"))
    both = {"none": logits, "flip": logits}
    return replace(base, images=images, labels=labels, logits=logits, by_tta=both, class_names=CLASS_NAMES)


def shirts_of(outcome: Outcome) -> list[int]:
    return (outcome.labels == SHIRT).nonzero().flatten().tolist()


def test_cells_by_hand(outcome: Outcome) -> None:
    cells, shirts = matrix_cells(outcome), shirts_of(outcome)
    # one cell for each of ten classes, and shirts as T-shirt and as bag
    assert set(cells) == {(i, i) for i in range(10)} | {(SHIRT, TOP), (SHIRT, BAG)}
    assert sum(len(cell.positions) for cell in cells.values()) == 1000
    wrong = cells[SHIRT, TOP]
    assert wrong.positions == shirts[:NUM_CONFUSED][::-1]  # the surest first
    assert wrong.confidences[0] == pytest.approx(probability(1 + 69 / 20))
    assert cells[SHIRT, BAG].positions == [shirts[NUM_CONFUSED]]
    right = cells[SHIRT, SHIRT]
    assert right.positions[0] == shirts[NUM_CONFUSED + 1]  # the least sure first, then in the order of the split
    assert right.confidences[:2] == pytest.approx([probability(2), probability(4)])
    assert right.positions[1:] == shirts[NUM_CONFUSED + 2 :]


def test_the_sheet_of_a_cell_holds_its_pictures_in_order(outcome: Outcome) -> None:
    found = cell_images(replace(outcome, published=torch.arange(1000) + 5000), [(SHIRT, TOP), (SHIRT, BAG), (0, 9)])
    assert set(found["cells"]) == {"6,0", "6,8"} and (found["width"], found["height"]) == (28, 28)
    cell, shirts = found["cells"]["6,0"], shirts_of(outcome)
    assert (cell["count"], cell["right"], len(cell["names"])) == (NUM_CONFUSED, False, 60)
    assert cell["names"] == [at + 5000 for at in shirts[10:NUM_CONFUSED][::-1]]  # by the data set's own index
    assert cell["confidences"][0] == round(100 * probability(1 + 69 / 20), 1)
    pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(cell["sheet"].split(",")[1]))).tobytes()))
    assert torch.equal(pixels.view(60, 28, 28).byte(), outcome.images[shirts[10:NUM_CONFUSED][::-1]])
    assert found["cells"]["6,8"]["confidences"] == [round(100 * probability(5), 1)]


def test_large_pictures_become_small_and_keep_their_shape() -> None:
    uri, (width, height) = sheet(torch.randint(0, 256, (3, 3, 100, 200), dtype=torch.uint8))
    assert uri.startswith("data:image/jpeg") and (width, height) == (64, 32)
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (64, 96)
    small = torch.zeros(2, 3, 32, 20, dtype=torch.uint8)
    assert sheet(small)[0].startswith("data:image/png") and sheet(small)[1] == (20, 32)
    assert sheet(small, 16, False)[0].startswith("data:image/jpeg") and sheet(small, 16, False)[1] == (10, 16)


@pytest.mark.thorough
def test_a_hundred_classes_of_noise_stay_below_15_megabytes(tmp_path: Path) -> None:
    """The worst case: nothing compresses, and half of 5,000 images in colour lie all over the matrix."""
    generator = torch.Generator().manual_seed(0)
    base, number = outcome_of(100, tmp_path), 5_000
    labels = torch.randint(100, (number,), generator=generator)
    logits = torch.randn(number, 100, generator=generator)
    logits[torch.arange(0, number, 2), labels[::2]] += 9.0
    images = torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8, generator=generator)
    both = {"none": logits, "flip": logits}
    found = findings(replace(base, images=images, labels=labels, logits=logits, by_tta=both))
    write_html(found, tmp_path / "report.html")
    size = (tmp_path / "report.html").stat().st_size
    assert 2_000_000 < size < 15_000_000
    values = context(found)
    assert len(values["matrix"]) == 100 and len(values["matrix"][0]["cells"]) == 100
    cells = values["cell_images"]["cells"]
    filled = sum(count > 0 for row in found.metrics["confusion_matrix"] for count in row)
    assert len(cells) == filled > 1500  # every cell that holds images can be opened
    most = max(len(cell["names"]) for cell in cells.values())
    assert most in {most for most, _, _ in CHOICES[2:]} and cells["3,3"]["count"] > most


def test_of_more_than_a_hundred_classes_the_worst_pairs_are_buttons(tmp_path: Path) -> None:
    found = findings(outcome_of(120, tmp_path))
    rows = matrix_rows(found.metrics["confusion_matrix"], found.outcome.class_names)
    assert len(rows) == 20 and len(rows[0]["cells"]) == 21 and rows[0]["cells"][-1]["prediction"] == -1
    text = render(context(found))
    pairs = text.split('<section id="pairs">')[1].split("</section>")[0]
    assert 'data-cell="7,3"' in pairs and pairs.count("data-cell") == 30  # the reverse of none of them happened
    cells = json.loads(text.split('id="cell-images">')[1].split("</script>")[0])["cells"]
    assert set(re.findall(r'data-cell="([\d,]+)"', text)) == set(cells)
    assert cells["7,3"]["count"] == 4


def test_names_do_not_leave_the_pages_script(tmp_path: Path) -> None:
    base = outcome_of(3, tmp_path)
    files = tuple(f"</script><b>{i}&'\"" for i in range(len(base.labels)))
    text = render(context(findings(replace(base, files=files))))
    assert "</script><b>" not in text and text.count("<script") == text.count("</script>") == 2
    names = json.loads(text.split('id="cell-images">')[1].split("</script>")[0])["cells"]["0,1"]["names"]
    assert names == [files[0]]


def test_without_a_script_the_matrix_can_be_read(outcome: Outcome) -> None:
    text = render(context(findings(outcome)))
    table = text.split('<table class="matrix">')[1].split("</table>")[0]
    assert 'aria-label="true Shirt, predicted T-shirt/top: 70 images">70</button>' in table
    assert 'aria-label="true Shirt, predicted Bag: 1 image">1</button>' in table
    assert table.count('scope="row"') == 10 and table.count('scope="col"') == 11
    assert table.count("<button") == 12 and table.count(">0</td>") == 88
    assert '<div id="cell" hidden>' in text  # what only the script fills


@pytest.fixture(scope="module")
def page(outcome: Outcome) -> Path:
    write_html(findings(outcome), outcome.directory / "report.html")
    return outcome.directory / "report.html"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser_tab() as opened:
        yield opened


SHOWN = """(() => {
  const panel = document.getElementById("cell"), items = [...panel.querySelectorAll("li")].filter(item => !item.hidden);
  return { heading: panel.querySelector("h3").textContent, status: panel.querySelector("[role=status]").textContent,
    items: items.map(item => item.innerText.split("\\n")), hidden: panel.hidden,
    at: document.activeElement.dataset.cell,
    open: [...document.querySelectorAll("[aria-expanded=true]")].map(button => button.dataset.cell),
    stops: document.querySelectorAll(".matrix [tabindex='0']").length,
    widths: [document.documentElement.scrollWidth, innerWidth] };
})()"""


@pytest.mark.parametrize("width", [400, 1280])
def test_a_click_shows_the_images_of_a_cell(page: Path, tab: Tab, outcome: Outcome, width: int) -> None:
    tab.open(page.as_uri(), width)
    before = tab.js(SHOWN)
    assert before["hidden"] and before["open"] == [] and before["stops"] == 1
    tab.click('[data-cell="6,0"]')
    shown, shirts = tab.js(SHOWN), shirts_of(outcome)
    assert shown["heading"] == "True Shirt, predicted T-shirt/top: 70 images" and shown["open"] == ["6,0"]
    assert shown["status"] == "the 60 most confident of 70"
    wanted = [[str(shirts[at]), f"{100 * probability(1 + at / 20):.1f} %"] for at in range(69, 9, -1)]
    assert shown["items"] == wanted
    # each shows another part of one sheet: the second of 60 at 1 / 59
    place = tab.js("document.querySelectorAll('#cell .px')[1].style.backgroundPosition")
    assert float(place.split()[1].rstrip("%")) == pytest.approx(100 / 59, abs=1e-3)
    assert tab.js("document.querySelector('#cell .px').offsetWidth") > 60
    assert shown["widths"][0] <= shown["widths"][1]
    tab.click('[data-cell="8,8"]')
    assert tab.js(SHOWN)["open"] == ["8,8"]
    tab.click('[data-cell="8,8"]')  # again: closed
    assert tab.js(SHOWN)["hidden"] and tab.said == []


def slide(tab: Tab, kind: str, value: str) -> dict[str, Any]:
    """Move the slider, or type the number, to a value."""
    field = f"document.querySelector('#cell [type={kind}]')"
    tab.js(f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('input', {{ bubbles: true }}))")
    return tab.js(SHOWN)


def test_confidence_filters_errors_from_below_and_right_ones_from_above(page: Path, tab: Tab, outcome: Outcome) -> None:
    tab.open(page.as_uri())
    tab.click('[data-cell="6,0"]')
    shown = slide(tab, "range", "80")
    # 1 + at / 20 with nine zeros: e^x / (e^x + 9) >= 0.8 from x = ln 36 = 3.58 on: at >= 51.7
    assert len(shown["items"]) == 70 - 52 and shown["status"] == "18 of the 60 most confident of 70"
    assert tab.js("document.querySelector('#cell [type=number]').value") == "80"
    assert tab.js("document.querySelector('#cell label').textContent") == "confidence at least"
    assert slide(tab, "number", "99")["items"] == []
    assert slide(tab, "number", "")["items"] == []  # not a number yet: as the slider stands
    tab.click('[data-cell="6,6"]')
    shirts = shirts_of(outcome)
    assert tab.js("document.querySelector('#cell label').textContent") == "confidence at most"
    right = len(shirts) - NUM_CONFUSED - 1
    assert tab.js(SHOWN)["status"] == f"all {right}, the least confident first"
    shown = slide(tab, "range", "50")  # e^2 / (e^2 + 9) = 45.1 %, e^4 / (e^4 + 9) = 85.8 %
    assert shown["items"] == [[str(shirts[NUM_CONFUSED + 1]), "45.1 %"]] and shown["status"] == f"1 of {right}"


def test_keys_move_open_and_close(page: Path, tab: Tab) -> None:
    tab.open(page.as_uri())
    tab.press("Tab")
    assert tab.js(SHOWN)["at"] == "0,0"
    for key, at in (
        ("ArrowRight", "0,0"),  # no other cell of the row holds images
        ("ArrowDown", "6,0"),
        ("ArrowRight", "6,6"),
        ("ArrowRight", "6,8"),
        ("ArrowDown", "8,8"),
        ("ArrowUp", "6,8"),
        ("ArrowLeft", "6,6"),
    ):
        tab.press(key)
        assert tab.js(SHOWN)["at"] == at, key
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.js(outline) == "solid"  # where one is can be seen
    tab.press("Enter")
    shown = tab.js(SHOWN)
    assert (shown["open"], shown["at"], shown["stops"]) == (["6,6"], "6,6", 1)
    tab.press("ArrowRight")
    tab.press(" ")
    shown = tab.js(SHOWN)
    assert shown["open"] == ["6,8"] and shown["status"] == "the only one"
    tab.press("Tab")  # to the slider
    assert tab.js("document.activeElement.id") == "limit"
    tab.press("ArrowRight")
    assert tab.js("document.activeElement.value") == "0.1"
    tab.press("Escape")
    shown = tab.js(SHOWN)
    assert shown["hidden"] and shown["at"] == "6,8" and tab.said == []


def test_an_address_opens_a_cell_and_a_wrong_one_none(page: Path, tab: Tab) -> None:
    tab.open(page.as_uri() + "#cell=6,8", 400)
    assert tab.js(SHOWN)["open"] == ["6,8"]
    tab.open(page.as_uri() + "#cell=1,2")
    assert tab.js(SHOWN)["hidden"] and tab.said == []
