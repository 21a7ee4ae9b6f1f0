"""Parts of a model that a training leaves as they are."""

import contextlib
from collections.abc import Iterator

from torch import nn


def freeze(*modules: nn.Module) -> None:
    """No gradients for the modules' weights, and eval mode: norms keep their statistics.

    ``train()`` of a model switches all its parts to training: a model calls this again at the end
    of its own ``train``.
    """
    for module in modules:
        module.requires_grad_(False)
        module.eval()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode for a while; then all its parts are in the modes they were in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
