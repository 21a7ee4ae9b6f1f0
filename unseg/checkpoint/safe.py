"""Loading weights from files that nobody vouches for: arrays and plain containers, never code."""

import argparse
import contextlib
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

# What pickled numpy arrays need, under the module names of numpy 1 and 2; nothing else is allowed.
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which and why."""


class UnreadableCheckpointError(CheckpointError):
    """A file of weights is damaged or holds code: another file may do in its place."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not an array")
        return super().find_class(module, name)


def load_pickle(file: IO[bytes]) -> Any:
    """Unpickle containers, numbers and numpy arrays; anything else raises UnpicklingError."""
    return _ArrayUnpickler(file, encoding="latin1").load()


def _load_torch(path: Path) -> Any:
    # DINO's and many other training states keep their command line; torch 2.4 cannot allow it.
    allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    with allow([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """What is wrong, without torch's escape codes and its advice to load the file unsafely."""
    text = str(error)
    if match := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"Unsupported global: {match[1]}"
    return text.strip().split("\n")[0] or type(error).__name__


def load_weights_file(path: str | os.PathLike) -> Any:
    """Read ``.pkl`` (numpy arrays) or any file of ``torch.save`` (tensors) onto the CPU.

    An ``argparse.Namespace`` in a file of ``torch.save`` is allowed beside tensors and containers.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableCheckpointError: the file is damaged or holds more than arrays and containers; the
            message names the first class or function that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return load_pickle(file)
        return _load_torch(path)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,  # torch: a truncated archive
        OSError,  # torch again
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        raise UnreadableCheckpointError(
            f"{path} is damaged or holds more than weights: {_reason(error)}"
        ) from error
