"""audit.html: suspects to decide on, near copies, and noise by class, as one offline page."""

import datetime
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fmnist.apps.audit.pool import Pool
from fmnist.apps.audit.table import HEADER, Row, cells
from fmnist.evaluation.misclassified import channels_last
from fmnist.evaluation.near_copies import MAX_PAIRS, NEAR_COPY, SIMILAR, find_pairs
from fmnist.evaluation.neighbours import Neighbours
from fmnist.evaluation.suspects import confident_joint
from fmnist.report.page import render
from fmnist.report.page_figures import data_uri
from fmnist.runtime.files import csv_bytes

NEAR = 3  # training images shown beside a suspect
SIDE, NEAR_SIDE = 96, 48  # pixels at most, of a suspect and of its neighbours: 500 of them in colour make 5 MB
CONFLICTS_SHOWN, COPIES_SHOWN, PAIRS_SHOWN = 90, 18, 12
# Positions of two similar images, those of the pool, then of the test images, and the correlation of their pixels; the
# most alike first.
Copies = list[tuple[int, int, float]]


def find_copies(pool: Pool, device: torch.device) -> Copies:
    """Search all pairs of training and test images; of test images that have another size, none."""
    test = pool.test.images
    images = torch.cat((pool.images, test)) if test.shape[1:] == pool.images.shape[1:] else pool.images
    pairs, correlations = find_pairs(images.to(device), SIMILAR)
    return [(a, b, value) for (a, b), value in zip(pairs.tolist(), correlations.tolist(), strict=True)]


def thumbnail(image: Tensor, side: int) -> str:
    """Return a uint8 [H, W] or [3, H, W] image as a URI, made smaller where it is larger than `side` pixels."""
    drawn, buffer = Image.fromarray(channels_last(image)), io.BytesIO()
    small = max(drawn.size) <= min(side, 32)
    drawn.thumbnail((side, side))
    kind = "png" if small else "jpeg"
    drawn.save(buffer, format=kind, **({"optimize": True} if small else {"quality": 85}))
    return data_uri(buffer.getvalue(), f"image/{kind}")


def audit_page(pool: Pool, rows: Sequence[Row], copies: Copies, origin: str, shown: int, device: torch.device) -> bytes:
    """Make the page.

    Args:
        pool: the images.
        rows: all that were ranked, the most suspect first.
        copies: what `find_copies` found.
        origin: what the ranking rests on.
        shown: suspects on the page; those that were decided before come on top of them, elsewhere in the ranking.
        device: where neighbours are searched.
    """
    front = [row for row in rows if row.rank <= shown]
    joint = confident_joint(pool.probabilities[pool.known], pool.labels[pool.known])
    wrong = joint - joint.diag().diag()
    state = hashlib.sha256(repr((pool.class_names, pool.labels.tolist(), pool.indices)).encode()).hexdigest()
    values = {
        "title": pool.title,
        "count": len(rows),
        "origin": origin,
        "date": datetime.date.today().isoformat(),
        "held_out": pool.held_out,
        "num_suspects": int(wrong.sum()),
        "cards": _cards(pool, front, device),
        "header": ",".join(HEADER),
        "elsewhere": [_csv(*cells(row, pool)) for row in rows[len(front) :] if row.decision],
        "classes": [[name, _csv(name)] for name in pool.class_names],
        "store": f"fmnist audit {state[:16]}",
        **_noise(pool, wrong),
        **_copies(pool, copies),
    }
    return render(values, "audit.html").encode()


def _csv(*row: object) -> str:
    return csv_bytes([], [row]).decode().split("\n", 1)[1].removesuffix("\n")


def _cards(pool: Pool, rows: Sequence[Row], device: torch.device) -> list[dict[str, Any]]:
    positions = torch.tensor([row.position for row in rows], dtype=torch.int64)
    near = torch.zeros(len(rows), 0, dtype=torch.int64)
    if len(rows) and len(pool) > 1:
        find = Neighbours(pool.features, device)
        near = find(pool.features[positions], min(NEAR, len(pool) - 1), positions)[1]
    return [
        {
            "key": pool.name(row.position),
            "name": pool.name(row.position),
            "rank": f"{row.rank:,}",
            "row": _csv(row.rank, pool.splits[row.position], pool.indices[row.position], pool.class_names[row.label]),
            "own_cell": f"{row.own:.6g}",
            "uri": thumbnail(pool.images[row.position], SIDE),
            "label": pool.class_names[row.label],
            "own": row.own,
            "other": pool.class_names[row.likely],
            "confidence": row.confidence,
            "suggested": row.suggested,
            "chosen": pool.class_names[row.suggested],
            "decision": row.decision,
            "near": [_neighbour(pool, item, row.label) for item in items],
        }
        for row, items in zip(rows, near.tolist(), strict=True)
    ]


def _neighbour(pool: Pool, item: int, label: int) -> dict[str, Any]:
    other = int(pool.labels[item])
    return {
        "uri": thumbnail(pool.images[item], NEAR_SIDE),
        "name": pool.name(item),
        "label": pool.class_names[other],
        "kind": "same" if other == label else "differs",
    }


def _noise(pool: Pool, wrong: Tensor) -> dict[str, Any]:
    """Return the rows of the two tables: by class, and the pairs that occur most."""
    names, counts = pool.class_names, torch.bincount(pool.labels[pool.known], minlength=len(pool.class_names))
    by_class = [
        {"name": name, "count": count, "wrong": errors, "share": errors / max(1, count)}
        for name, count, errors in zip(names, counts.tolist(), wrong.sum(dim=1).tolist(), strict=True)
    ]
    number, place = wrong.flatten().topk(min(PAIRS_SHOWN, wrong.numel()))
    by_pair = [
        {"label": names[at // len(names)], "likely": names[at % len(names)], "count": count}
        for count, at in zip(number.tolist(), place.tolist(), strict=True)
        if count
    ]
    return {"by_class": sorted(by_class, key=lambda row: -row["share"]), "by_pair": by_pair}


def _copies(pool: Pool, alike: Copies) -> dict[str, Any]:
    labels = torch.cat((pool.labels, pool.test.labels)).tolist()
    names = [*map(pool.name, range(len(pool))), *(f"test:{pool.test.position(at)}" for at in range(len(pool.test)))]

    def where(pair: tuple[int, int]) -> str:
        first, second = sorted({names[at].partition(":")[0] for at in pair} | {""})[-2:]
        return f"between {first} and {second}" if first else f"within {second}"

    def pair(a: int, b: int, correlation: float) -> dict[str, Any]:
        sides = [
            {
                "uri": thumbnail(pool.images[at] if at < len(pool) else pool.test.images[at - len(pool)], SIDE),
                "label": pool.class_names[labels[at]],
                "name": names[at],
            }
            for at in (a, b)
        ]
        return {"sides": sides, "differ": labels[a] != labels[b], "correlation": correlation}

    conflicts = [item for item in alike if labels[item[0]] != labels[item[1]]]
    near = [item[:2] for item in alike if item[2] > NEAR_COPY]
    agreeing = [item for item in alike if labels[item[0]] == labels[item[1]]][:COPIES_SHOWN]
    more = f", the first {CONFLICTS_SHOWN} of {len(conflicts):,}" if len(conflicts) > CONFLICTS_SHOWN else ""
    return {
        "near_copy": NEAR_COPY,
        "similar": SIMILAR,
        "num_pairs": len(alike),
        "cut_short": len(alike) >= MAX_PAIRS,
        "num_near": len(near),
        "num_conflicts": len(conflicts),
        "pair_counts": Counter(map(where, near)).most_common(),
        "pair_groups": [
            (f"Similar, with different labels{more}", [pair(*item) for item in conflicts[:CONFLICTS_SHOWN]]),
            ("The most alike of one label", [pair(*item) for item in agreeing]),
        ],
    }
