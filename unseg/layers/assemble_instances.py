"""The assembling module of InstanceFCN: a window's mask logits, copied out of k*k score maps.

Source: Dai et al., "Instance-sensitive fully convolutional networks" (2016), section 3. How a
window of m cells is cut into k bins where k does not divide m, and what lies outside the map, are
this project's choices (specs/proposals.md 2.1).

Dimensions: B images, k bins per side, h w cells of a map, N windows, m cells per side of a window,
r = (m - 1) / 2 cells on each side of its centre.
"""

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_REDUCED = (torch.float16, torch.bfloat16)


def window_bins(k: int, m: int) -> list[int]:
    """Which of k bins each of the m cells of a window's side belongs to.

    The bin that holds the cell's centre: ``floor((u + 1/2) * k / m)``, in integers. For m = 21 and
    k = 5 the bins have 4, 4, 5, 4, 4 cells. For odd k they are symmetric, so that flipping the maps
    and exchanging their channels flips the masks; ``floor(u * k / m)`` would not be.
    """
    return [(2 * u + 1) * k // (2 * m) for u in range(m)]


def _check(score_maps: Tensor, locations: Tensor, k: int, m: int) -> None:
    """Raise what :func:`assemble_instances` promises to."""
    for name, value in (("score_maps", score_maps), ("locations", locations)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    for name, value in (("k", k), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if m < 1 or m % 2 == 0:
        raise ValueError(f"m must be odd and positive, a window is centred on a cell: {m}")
    if not 1 <= k <= m:
        raise ValueError(f"k must be in 1..m, which is {m}: {k}")
    if score_maps.dtype not in _DTYPES:
        raise TypeError(f"score_maps must be floating, not {score_maps.dtype}")
    if locations.dtype != torch.int64:
        raise TypeError(f"locations must be int64, not {locations.dtype}")
    if score_maps.dim() != 4 or score_maps.shape[1] != k * k:
        raise ValueError(
            f"score_maps must have shape (B, {k * k}, h, w) for k = {k}: {tuple(score_maps.shape)}"
        )
    if score_maps.shape[2] == 0 or score_maps.shape[3] == 0:
        raise ValueError(f"score_maps must have cells: {tuple(score_maps.shape)}")
    if locations.dim() != 2 or locations.shape[1] != 3:
        raise ValueError(
            f"locations must have shape (N, 3), batch, y and x: {tuple(locations.shape)}"
        )
    if locations.device != score_maps.device:
        raise ValueError(
            f"locations must be on the device of score_maps, {score_maps.device}, "
            f"not {locations.device}"
        )


def _check_images(locations: Tensor, images: int) -> None:
    """Each window's image must exist.

    A GPU would have to be waited for, and a compiled graph be broken: there, torch's own bounds
    check of the gather remains.
    """
    if locations.device.type != "cpu" or torch.compiler.is_compiling() or len(locations) == 0:
        return
    low, high = (int(v) for v in locations[:, 0].aminmax())
    if low < 0 or high >= images:
        raise ValueError(
            f"locations name images {low}..{high}, score_maps has {images} (from 0 on)"
        )


def assemble_instances(
    score_maps: Tensor, locations: Tensor, k: int, m: int, pad_logit: float = -10.0
) -> Tensor:
    """Mask logits of windows centred at cells, every bin of cells from its own score map.

    For the window at (b, y, x) and its cell (u, v)::

        out[u, v] = score_maps[b, a(u) * k + a(v), y - r + u, x - r + v]

    with ``a`` as in :func:`window_bins`; channel 0 is the top left bin. Cells outside the map are
    `pad_logit`, and their gradient goes nowhere. k = 1 cuts windows out of one map. For even k and
    odd m the middle cells belong to the later bin, which no flip respects.

    Memory and time are O(N * m * m) and do not grow with k: the elements are gathered by their
    positions. Maps that are not contiguous (channels-last) are copied first, and those of half
    precision that need a gradient are taken to float32, because many windows' gradients are added
    up at one cell.

    The gradient is that of ``index_select``: one serial sum on the CPU, atomic additions on a GPU,
    whose order, and so whose last bits, change from run to run. Under
    ``torch.use_deterministic_algorithms(True)`` torch adds in a fixed order there too, more slowly.

    Args:
        score_maps: ``(B, k*k, h, w)`` of float32, float64, float16 or bfloat16; h and w at least 1.
        locations: ``(N, 3)`` int64: image, y and x of the windows' centre cells. Centres may lie
            outside the map; N may be 0.
        k: bins per side, 1..m; it need not divide m.
        m: cells per side of a window, odd.
        pad_logit: what cells outside the map get, "background" by default. 0 would mean a
            probability of one half.

    Returns:
        ``(N, m, m)`` of the maps' dtype.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: a shape does not fit, or on the CPU an image does not exist. On a GPU, where
            looking at the values would stop the queue, an image outside 0..B-1 is a device
            assertion of torch.
    """
    _check(score_maps, locations, k, m)
    images, _, h, w = score_maps.shape
    _check_images(locations, images)

    device = score_maps.device
    # Made on the host without a table: torch.compile folds it, and a GPU has nothing to copy.
    cell = torch.arange(m, device=device)
    bin_ = (2 * cell + 1) * k // (2 * m)  # (m,), window_bins
    image, y, x = locations.unbind(1)
    rows = y[:, None] - (m - 1) // 2 + cell  # (N, m)
    cols = x[:, None] - (m - 1) // 2 + cell
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((cols >= 0) & (cols < w))[:, None, :]
    # Position in the flat maps: a part of image, row and row's bin, and one of column and its bin.
    row_part = ((image[:, None] * k + bin_) * k * h + rows.clamp(0, h - 1)) * w
    col_part = bin_ * (h * w) + cols.clamp(0, w - 1)
    index = row_part[:, :, None] + col_part[:, None, :]  # (N, m, m)

    flat = score_maps.reshape(-1)
    if flat.dtype in _REDUCED and flat.requires_grad and torch.is_grad_enabled():
        flat = flat.float()
    logits = flat.index_select(0, index.flatten()).view(index.shape)
    return logits.to(score_maps.dtype).masked_fill(~inside, pad_logit)
