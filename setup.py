"""Build `unseg`: a Python package and one optional extension with its ops.

Run with ``pip install --no-build-isolation -e .`` so that the extension is compiled against the
torch that will load it. Without torch or a compiler the package installs all the same and the ops
run as plain PyTorch. Environment: UNSEG_NO_EXT=1 (no extension), FORCE_CUDA=1 (CUDA kernels also
without a GPU at hand), TORCH_CUDA_ARCH_LIST, NVCC_FLAGS and MAX_JOBS as for Detectron2.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("unseg/layers/csrc")
# For builds without a GPU at hand: code for Turing (T4), Ampere and Hopper, PTX for anything newer.
# The kernels use 64-bit popcounts, ballots and atomics, which all of these have.
DEFAULT_CUDA_ARCHS = "7.5;8.0;9.0+PTX"


def read_version() -> str:
    text = (ROOT / "unseg/__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, flags=re.M)[1]


def requirements() -> list[str]:
    required = [
        "torch>=2.4",
        "torchvision",
        "fvcore",
        "pycocotools>=2.0.7",
        "scikit-learn",
        "scipy",
        "geoopt",
        "timm",
        "lvis",
        "omegaconf>=2.1,<2.4",
    ]
    # opencv-python satisfies `import cv2` as well: do not put a second copy over it.
    if importlib.util.find_spec("cv2") is None:
        required.append("opencv-python-headless")
    return required


def warn(message: str) -> None:
    sys.stderr.write(f"\nWARNING (unseg): {message}\n\n")


def choose_cuda_archs(gpu_visible: bool) -> None:
    """Set TORCH_CUDA_ARCH_LIST where torch cannot see for which GPUs to compile.

    With a GPU visible, torch takes its architecture; a list of ours could lack it.
    """
    if not gpu_visible:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)


def extension() -> dict:
    """The arguments of setup() that build unseg._C, or none of them."""
    if os.getenv("UNSEG_NO_EXT", "0") == "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import (
            CUDA_HOME,
            BuildExtension,
            CppExtension,
            CUDAExtension,
        )
    except ImportError:
        warn(
            "torch is not importable, unseg's ops will run as plain PyTorch. If torch is "
            "installed, use `pip install --no-build-isolation`."
        )
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Compile if possible: a missing or failing compiler must not fail the installation."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # noqa: BLE001 (torch, ninja and distutils raise their own)
                warn(f"could not compile unseg's ops, they will run as plain PyTorch:\n{error}")
                self.extensions = []

    with_cuda = os.getenv("FORCE_CUDA", "0") == "1" or (
        torch.cuda.is_available() and CUDA_HOME is not None
    )
    sources = sorted(str(p) for p in (ROOT / CSRC).glob("*.cpp"))
    sources += sorted(str(p) for p in (ROOT / CSRC / "cpu").glob("*.cpp"))
    # No -std: torch adds the one that its headers need.
    compile_args = {"cxx": ["-O3", "-g0", "-fvisibility=hidden"]}
    link_args = []
    if sys.platform == "linux" and torch.backends.openmp.is_available():
        # at::parallel_for is a template: without OpenMP here it would run on one thread.
        compile_args["cxx"].append("-fopenmp")
        link_args.append("-fopenmp")
    macros = [("Py_LIMITED_API", "0x030A0000")]
    if with_cuda:
        choose_cuda_archs(torch.cuda.is_available())
        sources += sorted(str(p) for p in (ROOT / CSRC / "cuda").glob("*.cu"))
        macros.append(("WITH_CUDA", None))
        compile_args["nvcc"] = ["-O3", *os.getenv("NVCC_FLAGS", "").split()]
    make = CUDAExtension if with_cuda else CppExtension
    module = make(
        "unseg._C",
        [os.path.relpath(source, ROOT) for source in sources],
        include_dirs=[str(ROOT / CSRC)],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
    )
    module.optional = True
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    name="unseg",
    version=read_version(),
    description="Find, segment and group objects without labels: a Detectron2 extension",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unseg", "unseg.*"]),
    package_data={"unseg": ["layers/csrc/**/*"]},
    python_requires=">=3.11",
    # Detectron2 is not on PyPI under its own name: never list it here, `import unseg` asks for it.
    install_requires=requirements(),
    extras_require={
        "demo": ["scikit-image", "faster-coco-eval"],
        "test": [
            "pytest",
            "pytest-xdist",  # dev/test.sh deals the tests to two processes
            "hypothesis",
            "scikit-image",
            "faster-coco-eval",
            "supervision",
            "ruff",
        ],
    },
    **extension(),
)
