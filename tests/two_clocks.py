"""train.py on processes whose clocks differ: probed for real, then counted with steps of one second and a rank."""

import os
import sys
from dataclasses import replace
from typing import Any

import train
from fmnist.config.parse import parse_config
from fmnist.run import Run
from fmnist.training import budget


def main() -> None:
    measured, opened = budget.measure, Run.__init__

    def measure(*args: Any) -> tuple[budget.Costs, int | None]:
        found, micro_batch_size = measured(*args)
        steps = (1.0 + int(os.environ.get("RANK", "0")),) * len(found.steps)
        return replace(found, steps=steps, epoch=0.0, evaluation=0.0, save=0.0, end=0.0), micro_batch_size

    def standing(run: Run, *args: Any) -> None:
        opened(run, *args)
        run.clock, run.began = lambda: 0.0, 0.0

    budget.measure, Run.__init__, budget.REPORT_S = measure, standing, 0.0  # type: ignore[method-assign]
    train.main(parse_config(sys.argv[1:]))


if __name__ == "__main__":
    main()
