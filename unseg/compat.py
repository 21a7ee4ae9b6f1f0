"""The one place that knows there are several Detectron2 and torch versions.

Features are probed, version strings never compared: Detectron2's main branch still calls itself
0.6, like the release of 2021. Everything else in `unseg` may use what 0.5, 0.6 and main share.
"""

import importlib.util
import inspect
import platform
import warnings
from types import ModuleType

INSTALL_HINT = (
    "unseg needs Detectron2, which is not on PyPI under its own name. Install it with\n"
    "  python -m pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git'\n"
    "or, for CPUs and a first try, with `python dev/install_detectron2.py` from unseg's repository."
)


def require_detectron2() -> None:
    """Import Detectron2, or raise ImportError with the way to install it."""
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(INSTALL_HINT)
    with warnings.catch_warnings():
        # fvcore and Detectron2 script functions on import; torch 2.14 warns about each of them.
        warnings.simplefilter("ignore", FutureWarning)
        import detectron2.modeling  # noqa: F401


def detectron2_extension() -> ModuleType | None:
    """Detectron2's compiled module ``detectron2._C``, or None in a pure-Python build."""
    try:
        from detectron2 import _C
    except ImportError:
        return None
    return _C


def describe_detectron2() -> str:
    """Version, kind of build and place, for people. Main calls itself 0.6 like the 2021 release."""
    import detectron2
    from detectron2.engine import SimpleTrainer

    # main's trainers take more arguments than those of the releases
    newer = "gather_metric_period" in inspect.signature(SimpleTrainer.__init__).parameters
    line = "main" if newer else "release"
    extension = "with" if detectron2_extension() is not None else "without"
    return (
        f"{detectron2.__version__} ({line}, {extension} C++ extension) in {detectron2.__path__[0]}"
    )


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            return next(names).strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
