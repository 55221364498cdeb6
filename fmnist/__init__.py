"""Train image classifiers in a loop you can read.

From Python or a notebook:

    import fmnist

    run = fmnist.train("configs/mlp.yaml", schedule={"epochs": 2}, output_dir="runs/mlp")
    run.metrics()                       # what was logged, a dict per line
    run.evaluate("test")["top1"]
    run.predict(["shoe.jpg"])           # class names with probabilities
    fmnist.open_run("runs/mlp")         # the same object, later
"""

TYPE_CHECKING = False  # as type checkers read it; typing itself takes a tenth of what a command needs to answer
if TYPE_CHECKING:
    from fmnist.apps.api import RunResults, open_run, train

__all__ = ["RunResults", "open_run", "train"]


def __getattr__(name: str) -> object:
    """Import torch only when one of these is used: every command line imports this package."""
    if name in __all__:
        from fmnist.apps import api

        return getattr(api, name)
    raise AttributeError(f"module 'fmnist' has no attribute {name!r}")
