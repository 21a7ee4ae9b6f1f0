#!/usr/bin/env python3
"""Install a pure-Python Detectron2 0.5 from PyPI, for CPUs, CI and a first contact.

Detectron2 is not on PyPI under its own name. PyPI's ``detectron2-cdo==0.5`` sdist holds the
official v0.5 Python tree without its C++ sources, so it can neither be compiled nor imported on a
current stack as it is. This script downloads that sdist, checks its hash, applies the named
substitutions below (each must match exactly as often as it says) and installs the result without
an extension. Where it installed an older state of itself it installs again; a Detectron2 of another
origin is left as it is. GPU users should install the official package instead, see README.md.

    python dev/install_detectron2.py                  # install into this Python's environment
    python dev/install_detectron2.py --wheel-dir DIR  # only build the wheel
"""

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

PROJECT = "detectron2-cdo"
SDIST = "detectron2_cdo-0.5.tar.gz"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

# Put beside detectron2's own files: what `_C` is when the extension was not built. A Detectron2
# that has this file is ours, and its last line says which state of this script made it.
MARKER = "detectron2/utils/missing_extension.py"
MISSING_EXTENSION = '''\
"""Stands in for ``detectron2._C``, which this pure-Python build of Detectron2 does not have."""


class _MissingExtension:
    def __getattr__(self, name):
        raise ImportError(
            f"detectron2._C.{name} is not available: this Detectron2 was installed without its C++ "
            "extension (rotated boxes, deformable convolution and the C++ COCO evaluation are "
            "absent). Install the official Detectron2 to use it."
        )


_C = _MissingExtension()
'''


@dataclass(frozen=True)
class Substitution:
    """Replace every match of a regular expression in one file; `count` matches must exist."""

    path: str
    pattern: str
    replacement: str
    count: int = 1

    def apply(self, root: Path) -> None:
        file = root / self.path
        text, found = re.subn(self.pattern, self.replacement, file.read_text(), flags=re.M)
        if found != self.count:
            raise RuntimeError(
                f"{self.path}: {self.pattern!r} matched {found} times, expected {self.count}"
            )
        file.write_text(text)


def _guard_extension(path: str) -> Substitution:
    guarded = (
        "try:\n    from detectron2 import _C\nexcept ImportError:\n"
        "    from detectron2.utils.missing_extension import _C"
    )
    return Substitution(path, r"^from detectron2 import _C$", guarded)


def _numpy_scalar(path: str, name: str, count: int) -> Substitution:
    """np.bool, np.int, np.float, np.str were Python's types; numpy 1.24 removed these aliases."""
    return Substitution(path, rf"\bnp\.{name}\b", name, count)


SUBSTITUTIONS = (
    # the extension is optional
    _guard_extension("detectron2/layers/rotated_boxes.py"),
    _guard_extension("detectron2/layers/deform_conv.py"),
    _guard_extension("detectron2/layers/roi_align_rotated.py"),
    _guard_extension("detectron2/evaluation/fast_eval_api.py"),
    # names that Pillow 10 and numpy 1.24 removed
    Substitution("detectron2/data/transforms/transform.py", r"Image\.LINEAR", "Image.BILINEAR"),
    _numpy_scalar("detectron2/data/build.py", "int", 2),
    _numpy_scalar("detectron2/data/datasets/pascal_voc.py", "str", 1),
    _numpy_scalar("detectron2/evaluation/pascal_voc_evaluation.py", "bool", 2),
    _numpy_scalar("detectron2/evaluation/sem_seg_evaluation.py", "int", 2),
    _numpy_scalar("detectron2/evaluation/sem_seg_evaluation.py", "float", 5),
    _numpy_scalar("detectron2/structures/masks.py", "bool", 2),
    _numpy_scalar("detectron2/utils/visualizer.py", "bool", 3),
    _numpy_scalar("detectron2/utils/video_visualizer.py", "bool", 1),
    # setuptools 82 has no pkg_resources
    Substitution("detectron2/model_zoo/model_zoo.py", r"^import pkg_resources$", "import pathlib"),
    Substitution(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", (os\.path.*\))\s*\)',
        r"str(pathlib.Path(__file__).parent / \1)",
    ),
    # setup.py: no extension, no torch at build time, the model-zoo YAMLs, no dead pins
    Substitution("setup.py", r"^import torch\nfrom torch.*$", ""),
    Substitution("setup.py", r"^torch_ver = .*\nassert torch_ver .*$", ""),
    Substitution("setup.py", r"^    ext_modules=get_extensions\(\),\n    cmdclass=.*\n", ""),
    Substitution(
        "setup.py", r"get_model_zoo_configs\(\)\},", '["configs/**/*.yaml", "configs/**/*.py"]},'
    ),
    Substitution("setup.py", r'^        "black==21\.4b2",\n', ""),
    Substitution("setup.py", r'^        "future",.*\n', ""),
)


def build_id() -> str:
    """A hash of everything that decides about the installed files."""
    recipe = repr((SHA256, SUBSTITUTIONS, MISSING_EXTENSION))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def is_current(package: Path) -> bool:
    """Whether to keep an installed Detectron2: made by this state of the script, or by others.

    Args:
        package: the folder ``detectron2``.
    """
    marker = package.parent / MARKER
    return not marker.is_file() or f'BUILD = "{build_id()}"' in marker.read_text()


def _index_urls() -> list[str]:
    """The index pip itself would ask, then PyPI."""
    configured = os.environ.get("PIP_INDEX_URL")
    if not configured:
        answer = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
            capture_output=True,
            text=True,
        )
        configured = answer.stdout.strip()
    urls = [configured] if configured else []
    return urls + ["https://pypi.org/simple"]


def download_sdist(target: Path) -> None:
    """Fetch the sdist through the package index and verify its sha256."""
    errors = []
    for index in _index_urls():
        page = f"{index.rstrip('/')}/{PROJECT}/"
        try:
            with urllib.request.urlopen(page, timeout=60) as answer:
                html = answer.read().decode()
            link = re.search(rf'href="([^"#]*{re.escape(SDIST)})', html)
            if link is None:
                raise RuntimeError(f"no link to {SDIST}")
            with urllib.request.urlopen(urllib.parse.urljoin(page, link[1]), timeout=60) as answer:
                data = answer.read()
        except (OSError, RuntimeError) as error:
            errors.append(f"{page}: {error}")
            continue
        digest = hashlib.sha256(data).hexdigest()
        if digest != SHA256:
            raise RuntimeError(f"{SDIST} from {page} has sha256 {digest}, expected {SHA256}")
        target.write_bytes(data)
        return
    raise RuntimeError(f"could not download {SDIST}:\n  " + "\n  ".join(errors))


def prepare_source(folder: Path) -> Path:
    """Download, unpack and substitute; returns the folder that holds setup.py."""
    archive = folder / SDIST
    download_sdist(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = folder / SDIST.removesuffix(".tar.gz")
    for substitution in SUBSTITUTIONS:
        substitution.apply(root)
    (root / MARKER).write_text(f'{MISSING_EXTENSION}BUILD = "{build_id()}"\n')
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel-dir", type=Path, help="only build the wheel, into this folder")
    args = parser.parse_args()
    installed = importlib.util.find_spec("detectron2")
    if args.wheel_dir is None and installed is not None:
        if is_current(Path(installed.submodule_search_locations[0])):
            sys.stdout.write("detectron2 is already installed, nothing to do\n")
            return
        sys.stdout.write("detectron2 was installed by an older state of this script: again\n")
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as folder:
        root = str(prepare_source(Path(folder)))
        if args.wheel_dir is not None:
            wheel_dir = str(args.wheel_dir)
            subprocess.check_call([*pip, "wheel", "--no-deps", "--wheel-dir", wheel_dir, root])
        else:
            if installed is not None:  # the version is the same, so pip alone might keep it
                subprocess.check_call([*pip, "uninstall", "--quiet", "--yes", PROJECT])
            subprocess.check_call([*pip, "install", "--quiet", root])


if __name__ == "__main__":
    main()
