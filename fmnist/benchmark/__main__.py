"""Entry: fmnist benchmark {data,train,all,colour,plot,accuracy,programs} [options]; --help explains them."""

import sys

from fmnist.benchmark.command_line import PROGRAM, parse
from fmnist.runtime.console import log_to_console, one_line_errors
from fmnist.runtime.files import read_json
from fmnist.runtime.ownership import check_outputs


def main(argv: list[str]) -> int:
    """Run the benchmark; return the exit status, 1 where the gate refused a loader or one failed."""
    if argv[:1] == ["accuracy"]:
        from fmnist.benchmark import accuracy

        return accuracy.main(argv[1:])
    if argv[:1] == ["programs"]:
        from fmnist.benchmark import programs

        return programs.main(argv[1:])
    options = parse(argv)
    from fmnist.benchmark.output import draw  # late: importing torch takes seconds
    from fmnist.benchmark.suite import Suite
    from fmnist.runtime.compute import Compute

    log_to_console()
    with one_line_errors(PROGRAM):
        path = options.file or options.output.with_name(f"{options.output.name}.json")  # a stem may hold dots
        chart = path.with_suffix(".png")
        marks = {chart: b""} if options.file else {path: b'"name": "benchmark"', chart: b""}
        check_outputs(marks, force=options.force)
        if options.mode == "plot":
            draw(read_json(options.file), chart)
            return 0
        with Compute(keep_memory=options.allocator == "kept") as compute:
            own = ("file", "baseline", "output", "force")  # only the main process reads and writes them
            compute.agree_on_options({k: v for k, v in vars(options).items() if k not in own})
            return Suite(options, argv, path, compute).run()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
