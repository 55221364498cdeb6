"""The command after its arguments."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fmnist.apps.audit.audit_page import audit_page, find_copies
from fmnist.apps.audit.pool import describe, gather
from fmnist.apps.audit.table import CSV_NAME, HEADER, earlier_decisions, rank_rows, table_bytes
from fmnist.config.shipped import command
from fmnist.evaluation.suspects import rank_labels
from fmnist.runtime.console import counted
from fmnist.runtime.files import write_atomic
from fmnist.runtime.ownership import check_outputs
from fmnist.trained import open_trained

PAGE_NAME = "audit.html"


def audit(paths: Sequence[Path], args: argparse.Namespace) -> str:
    """Rank the labels, write audit.csv and audit.html, and say what was found.

    Args:
        paths: of the runs.
        args: device, batch_size, root, suspects, output and force, as on the command line.

    Raises:
        ValueError: runs, data or decisions that cannot be used; one line.
    """
    runs = [open_trained(path, args.device, args.batch_size) for path in paths]
    first = runs[0]
    output = args.output or first.folder("audit")
    table, page = output / CSV_NAME, output / PAGE_NAME
    check_outputs({table: ",".join(HEADER).encode(), page: b'content="fmnist audit"'}, force=args.force)
    pool = gather(runs, args.root)
    file = first.cfg.data.corrections
    corrections = None if file is None else Path(os.path.expanduser(file))
    decided = earlier_decisions(table, corrections, pool, force=args.force)
    suspects = rank_labels(pool.probabilities, pool.labels, pool.images, pool.features, first.device)
    rows = rank_rows(pool, suspects, decided)
    write_atomic(table, table_bytes(rows, pool))  # first: it is there also where a page fails
    copies = find_copies(pool, first.device)
    origin = describe(runs, pool)
    write_atomic(page, audit_page(pool, rows, copies, origin, int(args.suspects), first.device))
    kept = f"; {counted(len(decided), 'decision')} kept" if decided else ""
    return (
        f"{counted(len(rows), 'training image')} ranked, from {origin}; "
        f"{counted(len(copies), 'pair')} of similar images{kept}\n"
        f"written to {output}: {PAGE_NAME}, {CSV_NAME}\n"
        f"after deciding: {command('train')} --config {runs[0].directory}/config.yaml --data.corrections {table} "
        f"--output_dir {runs[0].directory}_corrected"
    )
