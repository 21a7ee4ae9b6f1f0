"""What is installed: ``python -m unseg.tools.collect_env``. Paste its output into reports."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import torch
from tabulate import tabulate

import unseg
from unseg import compat
from unseg.layers import backend, has_native

_PACKAGES = (
    "torchvision",
    "fvcore",
    "iopath",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "opencv-python",
    "pycocotools",
    "faster-coco-eval",
    "scikit-learn",
    "scipy",
    "geoopt",
    "timm",
    "lvis",
    "omegaconf",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> Iterator[tuple[str, str]]:
    """Pairs of what and which."""
    yield "unseg", f"{unseg.__version__} in {unseg.__path__[0]}"
    yield "Python", f"{sys.version.split()[0]} on {platform.platform()}"
    yield "CPU", f"{compat.cpu_name()}, {torch.get_num_threads()} threads"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built'}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{properties.name}, compute {properties.major}.{properties.minor}"
    if not torch.cuda.is_available():
        yield "GPU", "none"
    yield "Detectron2", compat.describe_detectron2()
    yield "compiled ops", backend() if has_native() else f"{backend()} (extension not built)"
    for package in _PACKAGES:
        yield package, _version(package)


def main() -> None:
    """Entry point."""
    sys.stdout.write(tabulate(environment()) + "\n")


if __name__ == "__main__":
    main()
