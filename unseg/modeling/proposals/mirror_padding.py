"""Mirror padding for the convolutions of a backbone, as DeepMask's released models have it.

Detectron2's convolutions ignore ``padding_mode``. Here the input is padded before a convolution,
which itself pads no more; names and shapes of weights stay as they are, and so do pools, whose
border is minus infinity.

Legend: B images, C channels, h w cells.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.layers import DeformConv, ModulatedDeformConv
from torch import Tensor, nn

PAD_MODES = ("zeros", "symmetric", "port")


def _mirrored(size: int, pad: int, repeat_edge: bool, device: torch.device) -> Tensor:
    """int64 (size + 2 * pad,): which cell each padded cell shows, mirrored as often as needed."""
    positions = torch.arange(-pad, size + pad, device=device)
    # Mirrors on both sides repeat the row with this period.
    period = 2 * size if repeat_edge else max(2 * (size - 1), 1)
    positions = positions % period
    return torch.minimum(positions, period - int(repeat_edge) - positions)


def mirror_pad(x: Tensor, pad: tuple[int, int], repeat_edge: bool) -> Tensor:
    """Pad the two last dimensions by mirror images of what is there.

    As :func:`numpy.pad`, modes "symmetric" (``c b a | a b c``) and "reflect" (``c b | a b c``): any
    width is possible, also more than the map is large.

    Args:
        x: (B, C, h, w), h and w at least 1.
        pad: cells above and below, and cells left and right.
        repeat_edge: True for symmetric, False for reflect.

    Returns:
        (B, C, h + 2 pad[0], w + 2 pad[1]).

    Raises:
        ValueError: `x` has no cells.
    """
    height, width = x.shape[-2:]
    if not height or not width:
        raise ValueError(f"a map without cells cannot be mirrored: {tuple(x.shape)}")
    sides = (pad[1], pad[1], pad[0], pad[0])
    if repeat_edge and max(pad) <= 1:
        return F.pad(x, sides, mode="replicate")  # the same, in one pass
    if not repeat_edge and pad[0] < height and pad[1] < width:
        return F.pad(x, sides, mode="reflect")
    for dim, size, cells in ((2, height, pad[0]), (3, width, pad[1])):
        if cells:
            x = x.index_select(dim, _mirrored(size, cells, repeat_edge, x.device))
    return x


class MirrorPad:
    """A forward pre-hook of a convolution: pads its input."""

    def __init__(self, pad: tuple[int, int], repeat_edge: bool):
        self.pad = pad
        self.repeat_edge = repeat_edge

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return mirror_pad(args[0], self.pad, self.repeat_edge)


def _padded_convs(backbone: nn.Module) -> Iterator[nn.Conv2d]:
    for name, module in backbone.named_modules():
        if isinstance(module, (DeformConv, ModulatedDeformConv)):
            raise ValueError(
                f"MODEL.DEEPMASK.PAD_MODE must be zeros for deformable convolutions: {name}"
            )
        if not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1:
            continue
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise ValueError(
                "MODEL.DEEPMASK.PAD_MODE: this convolution pads in a way of its own "
                f"({module.padding}, {module.padding_mode}): {name}"
            )
        if any(module.padding):
            yield module


def set_padding(backbone: nn.Module, mode: str) -> None:
    """Let the convolutions of a built backbone that are larger than 1x1 pad by `mode`, in place.

    Args:
        backbone: a ResNet or VGG, as built, that no mode was set for.
        mode: "zeros" leaves it as it is; "symmetric" repeats the border's cell (released in Lua);
            "port" does so for kernels above 3x3, the first one of a ResNet, and does not for 3x3
            (released in PyTorch).

    Raises:
        ValueError: there is no such mode, or no convolution that it could change, or one that it
            cannot.
    """
    if mode not in PAD_MODES:
        raise ValueError(f"MODEL.DEEPMASK.PAD_MODE must be one of {', '.join(PAD_MODES)}: {mode!r}")
    if mode == "zeros":
        return
    convs = list(_padded_convs(backbone))
    if not convs:
        raise ValueError(
            f"MODEL.DEEPMASK.PAD_MODE {mode!r} changes nothing: the backbone pads no convolution"
        )
    for conv in convs:
        repeat_edge = mode == "symmetric" or max(conv.kernel_size) > 3
        conv.register_forward_pre_hook(MirrorPad(tuple(conv.padding), repeat_edge))
        conv.padding = (0, 0)
