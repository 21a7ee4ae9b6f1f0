"""Loading weights from files that nobody vouches for: arrays and plain containers, never code."""

import os
import pickle
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
    """A file of weights is damaged, holds code or is of another kind; the message names it."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not an array")
        return super().find_class(module, name)


def load_pickle(file: IO[bytes]) -> Any:
    """Unpickle containers, numbers and numpy arrays; anything else raises UnpicklingError."""
    return _ArrayUnpickler(file, encoding="latin1").load()


def load_weights_file(path: str | os.PathLike) -> Any:
    """Read ``.pkl`` (numpy arrays) or any file of ``torch.save`` (tensors) onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or holds more than arrays and containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return load_pickle(file)
        return torch.load(path, map_location="cpu", weights_only=True)
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
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or holds more than weights: {reason}") from error
