"""Parts of a model that a training leaves as they are."""

from torch import nn


def freeze(*modules: nn.Module) -> None:
    """No gradients for the modules' weights, and eval mode: norms keep their statistics.

    ``train()`` of a model switches all its parts to training: a model calls this again at the end
    of its own ``train``.
    """
    for module in modules:
        module.requires_grad_(False)
        module.eval()
