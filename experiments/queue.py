"""Run every experiment of queue.yaml that has no result yet, in order.

python -m experiments.queue [--jobs 2] [--only NAME ...]  stopped or killed, the same command goes on where it was
python -m experiments.queue --plan                        what is left, and the processor minutes of it by estimate
python -m experiments.queue --table                       what is finished: mean and standard deviation over seeds
python -m experiments.queue --slices FOLDER               a figure of each search over a grid: top1 by each option

NAME is an entry, a group of them, or one seed (cnn_seed0). Several queues may run at once: none trains what another is
training. experiments/queue_file.py says how an entry is written.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from experiments.median_stopping import lags
from experiments.queue_entries import Entry, chosen, has_result, in_order, names, result_path
from experiments.queue_file import read_queue
from experiments.queue_job import ROOT, Job, take_lock
from experiments.queue_results import curve, plan, result_of, table
from fmnist.runtime.files import read_json, write_json

POLL_S = 0.5


@dataclass
class Queue:
    """The runs that are wanted, and those that are going on.

    Attributes:
        entries: all of the file; `left` are the runs of them that are wanted and have no result.
        jobs: how many are trained at once; with several each has its share of the cores.
        stopped_by: the signal that asked for the end, by name.
    """

    entries: list[Entry]
    results: Path
    runs: Path
    jobs: int = 1
    only: list[str] | None = None
    running: list[Job] = field(default_factory=list)
    failed: int = 0
    stopped_by: str = ""

    def __post_init__(self) -> None:
        known = {name for entry, seed in in_order(self.entries) for name in names(entry, seed)}
        if unknown := set(self.only or ()) - known:
            raise ValueError(f"--only {min(unknown)}: the queue has no such entry, group or seed")
        self.left = [run for run in in_order(self.entries) if self.wants(*run) and not self._has_result(*run)]

    def wants(self, entry: Entry, *seeds: int) -> bool:
        """Say whether --only names one of these runs of an entry; of any seed where none is given."""
        return self.only is None or any(names(entry, seed) & set(self.only) for seed in seeds or entry.seeds)

    def _has_result(self, entry: Entry, seed: int) -> bool:
        """Say whether a run is done; ValueError where it was of other options."""
        path = result_path(self.results, entry.name, seed)
        ready = chosen(entry, self.entries, self.results)
        return path.is_file() if ready is None else has_result(ready, seed, path)

    def work(self) -> None:
        """Run what is left, until all is done or a signal asks for the end.

        A run that fails does not keep the next from running. What another queue is training is waited for, and taken
        over if that queue dies.
        """
        previous = {number: signal.signal(number, self._note_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.share()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def share(self) -> None:
        """Do as `work`, in any thread, and without listening to signals."""
        try:
            while (self.left or self.running) and not self.stopped_by:
                while len(self.running) < self.jobs and (job := self._next()):
                    self.running.append(job)
                if not self.running and self._stuck():
                    break
                time.sleep(POLL_S)
                self._look()
        finally:  # whatever happened here, the trainers save
            for job in self.running:
                job.stop()
            for job in self.running:
                job.ended(wait=True)
                self._conclude(job)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name

    def _next(self) -> Job | None:
        """Start the first run that can be; None where there is none."""
        for run in list(self.left):
            entry, seed = chosen(run[0], self.entries, self.results), run[1]
            if entry is None or (lock := take_lock(self.runs / f"{entry.name}_seed{seed}")) is None:
                continue
            self.left.remove(run)
            if has_result(entry, seed, result_path(self.results, entry.name, seed)):  # another queue's, meanwhile
                os.close(lock)
                continue
            print(f"--- {entry.name}_seed{seed}", flush=True)
            threads = max(1, cores() // self.jobs) if self.jobs > 1 else None
            return Job(entry, seed, self.runs / f"{entry.name}_seed{seed}", lock, threads)
        return None

    def _stuck(self) -> bool:
        """Say whether all that is left waits for trials that failed; those that others train are waited for."""
        left = {entry.name for entry, _ in self.left}
        waiting = [entry for entry, _ in self.left if chosen(entry, self.entries, self.results) is None]
        stuck = bool(self.left) and len(waiting) == len(self.left) and not any(left & set(e.trials) for e in waiting)
        if stuck:
            print("--- trials without a result, so not run: " + ", ".join(sorted(left)), flush=True)
            self.failed += len(self.left)
        return stuck

    def _look(self) -> None:
        """Take the results of what has ended, and stop trials that lag."""
        for job in [job for job in self.running if job.ended()]:
            self._conclude(job)
            self.running.remove(job)
        for job in self.running:
            if job.entry.stop_after is not None and not job.lagging and self._lags(job, job.entry.stop_after):
                print(f"--- {job.entry.name}_seed{job.seed} lags behind and is stopped", flush=True)
                job.lagging = True
                job.stop()

    def _lags(self, job: Job, after: float) -> bool:
        """Say whether a trial may be stopped, by the results and the running curves of the others of its grid."""
        trial, others = curve(job.directory), []
        if len(trial) <= job.validations:  # nothing new: it may not even listen to signals yet
            return False
        for other in self.entries:
            if (
                other.group == job.entry.group
                and other.label == job.entry.label
                and other.search
                and other != job.entry
            ):
                path = result_path(self.results, other.name, job.seed)
                running = self.runs / f"{other.name}_seed{job.seed}"
                others.append(read_json(path)["val"] if path.is_file() else curve(running))
        return lags(trial, others, after)

    def _conclude(self, job: Job) -> None:
        """Write the result of a run that has ended, if it has one, and let go of its directory."""
        name, status = f"{job.entry.name}_seed{job.seed}", job.status()
        if status == "finished" or (status == "stopped" and job.lagging and not self.stopped_by):
            try:
                result = result_of(job.entry, job.seed, job.directory)
                write_json(result_path(self.results, job.entry.name, job.seed), result)
            except (KeyError, ValueError, OSError) as error:  # one bad run costs the night no other
                print(f"--- {name} has no result: {type(error).__name__} {error}", flush=True)
                self.failed += 1
        elif not self.stopped_by:
            print(f"--- {name} did not finish", flush=True)
            self.failed += 1
        job.release()


def cores() -> int:
    """Return the cores that the job or this process was given, which the trainers share."""
    from fmnist.runtime.hardware import available_cores  # late: torch

    return available_cores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these entries, groups, or seeds of an entry, alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores")
    for option, default in (
        ("queue", "experiments/queue.yaml"),
        ("results", "experiments/results/queue"),
        ("runs", "runs/queue"),
    ):
        parser.add_argument(f"--{option}", type=Path, default=Path(default), help=f"default: {default}")
    parser.add_argument("--plan", action="store_true", help="print what is left, run nothing")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    parser.add_argument("--slices", type=Path, metavar="FOLDER", help="draw each search over a grid, run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}; valid: 1 or more")
        queue = Queue(read_queue(args.queue), args.results, args.runs, args.jobs, args.only)
        if args.table:
            print(table([entry for entry in queue.entries if queue.wants(entry)], args.results))
        elif args.plan:
            print(plan(queue.left, args.jobs if args.jobs > 1 else cores()))
        elif args.slices:
            from experiments.search_figure import draw_searches  # late: matplotlib

            print(*draw_searches(queue.entries, args.results, args.slices), sep="\n")
        else:
            queue.work()
    except ValueError as error:
        sys.exit(f"experiments.queue: {error}")
    if queue.stopped_by:
        sys.exit(f"stopped by {queue.stopped_by}; the same command goes on")
    if queue.failed:
        sys.exit(f"{queue.failed} run(s) did not finish; the same command tries them again")


if __name__ == "__main__":
    main()
