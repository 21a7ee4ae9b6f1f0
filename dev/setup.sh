#!/usr/bin/env bash
# Makes a Python environment ready for unseg and prints the interpreter to use on its last line.
#
#   dev/setup.sh                     a .venv at the repository root: torch, Detectron2, unseg
#   UNSEG_PYTHON=/path/python dev/setup.sh     use that environment (it must have torch, Detectron2)
#
# A second run finds the work done (a stamp over everything the set-up reads) and returns at once.
set -euo pipefail
# Relative paths of interpreters are the caller's, not the repository's.
for name in UNSEG_PYTHON PYTHON; do
    if [[ "${!name:-}" == */* && "${!name}" != /* ]]; then declare "$name=$PWD/${!name}"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*" >&2; }

if [[ -n "${UNSEG_PYTHON:-}" ]]; then
    python="$UNSEG_PYTHON"
    "$python" -c 'import torch, detectron2' >&2 || {
        say "$python cannot import torch and detectron2: install them there, or unset UNSEG_PYTHON"
        exit 1
    }
    extras="demo,test"
else
    python="$PWD/.venv/bin/python"
    extras="demo,test"
    # A kill in the middle of `python -m venv` leaves an interpreter without pip.
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="${PYTHON:-python3}"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            say "unseg needs Python 3.11 or newer; $base is $("$base" --version 2>&1). Set PYTHON."
            exit 1
        }
        say "creating .venv with $("$base" --version)"
        "$base" -m venv .venv
    fi
fi

# What the environment was made from; the stamp lies in the environment it describes.
where=$("$python" -c 'import sys; print(sys.prefix)')
stamp="$where/.unseg-setup"
state=$({ cat setup.py pyproject.toml dev/setup.sh dev/install_detectron2.py
          find unseg/layers/csrc -type f | sort | xargs cat
          printf '%s\n' "$PWD" "${FORCE_CUDA:-}" "${TORCH_CUDA_ARCH_LIST:-}" "${UNSEG_NO_EXT:-}"
        } | sha256sum | cut -d' ' -f1)
if [[ "$(cat "$stamp" 2>/dev/null || true)" == "$state" ]]; then
    echo "$python"
    exit 0
fi
rm -f "$stamp"

pip() { "$python" -m pip --disable-pip-version-check install --quiet "$@" >&2; }
if [[ -z "${UNSEG_PYTHON:-}" ]]; then
    say "installing torch 2.14.1 and torchvision 0.29.1 (about a minute)"
    pip torch==2.14.1 torchvision==0.29.1 "setuptools>=64" wheel ninja
    say "installing Detectron2 (the pure-Python build, see dev/install_detectron2.py)"
    "$python" dev/install_detectron2.py >&2
else
    pip "setuptools>=64" wheel
fi
say "installing unseg and compiling its ops"
pip --no-build-isolation -e ".[$extras]"
# lvis asks for opencv-python, which needs a display library that servers lack; the headless wheel
# holds the same module.
"$python" -c 'import cv2' 2>/dev/null || pip --force-reinstall --no-deps opencv-python-headless
"$python" -m unseg.tools.collect_env >&2
echo "$state" > "$stamp"
echo "$python"
