"""All loaders by name, in the order of the tables."""

from fmnist.benchmark import on_device, ours, pil_loader
from fmnist.benchmark.pipelines import Pipeline, Setting, Synthetic, UnavailableError

PIPELINES: dict[str, type[Pipeline]] = {
    kind.name: kind
    for kind in (
        Synthetic,
        ours.OursTriton,
        ours.OursCompiled,
        ours.OursEager,
        pil_loader.PilAllCores,
        pil_loader.PilTwoWorkers,
        pil_loader.PilResizeFirst,
        on_device.V2Batch,
        on_device.V2Image,
        on_device.Kornia,
        on_device.KorniaResizeFirst,
    )
}
OURS = ("ours-triton", "ours-compiled", "ours-eager")


def build(names: tuple[str, ...], setting: Setting) -> tuple[list[Pipeline], dict[str, str]]:
    """Build the loaders that can run here.

    Returns:
        Them, and for each of the others the reason why not.
    """
    built, skipped = [], {}
    for name in names:
        try:
            built.append(PIPELINES[name](setting))
        except (UnavailableError, ImportError) as error:
            skipped[name] = str(error)
    return built, skipped
