"""What identifies a file whose name may change: hashes of its content."""

import hashlib
import os

import torch
from torch import Tensor

from unseg.checkpoint.safe import load_weights_file


def file_hash(path: str | os.PathLike) -> str:
    """sha256 of the bytes of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(path: str) -> str:
    """sha256 of the weights in a file, or `path` itself where it is not a local file.

    Of a ``.pth`` with weights under "model" only they count: names, types, shapes and values. The
    bytes of the file also hold the state of a training and how it was pickled, which differ between
    a run and the same run killed and resumed.

    Raises:
        UnreadableCheckpointError: it is a ``.pth`` that is damaged or holds code.
    """
    if not os.path.isfile(path):
        return path
    content = load_weights_file(path) if path.endswith(".pth") else None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) for v in model.values()):
        return file_hash(path)
    digest = hashlib.sha256()
    for name, value in sorted(model.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
