"""Pairwise colour affinity: neighbours of one colour share one label (BoxInst, section 3.3;
FreeSOLO, section 3.2).

For neighbours i and j with foreground probabilities p_i, p_j the loss is
-log(p_i p_j + (1 - p_i)(1 - p_j)). On logits a, b that is

    softplus(a) + softplus(b) - softplus(a + b),

which needs no probabilities and never overflows. The derivative with respect to a is
sigmoid(a) - sigmoid(a + b). Loss and gradient are computed in one pass, so that nothing is kept
for the backward pass but the gradient. The loss of a pair is symmetric, so that only half of the
shifts are computed, each with the weights of both directions.

Legend: B images, P masks, T shifts (half of the neighbours), h w mask pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from unseg.layers.color import rgb_to_lab

# On a GPU masks are processed so many pixels at a time: it bounds the memory of the intermediate
# results, and is large enough to keep the device busy.
_CHUNK_ELEMENTS = 1 << 24


def half_neighbourhood(size: int = 3, dilation: int = 2) -> list[tuple[int, int]]:
    """One shift (dy, dx) of each pair of opposite ones of a dilated square neighbourhood.

    Raises:
        ValueError: the size is not odd and at least 3.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"LOSS.PAIRWISE_SIZE must be odd and at least 3, got {size}")
    r = size // 2
    steps = [(dy, dx) for dy in range(-r, r + 1) for dx in range(-r, r + 1)]
    return [(dy * dilation, dx * dilation) for dy, dx in steps if (dy, dx) > (0, 0)]


def _views(shape: torch.Size, shift: tuple[int, int]) -> tuple[tuple, tuple] | None:
    """Slices of the last two dimensions: pixels i whose neighbour j = i + shift exists, and j."""
    dy, dx = shift
    h, w = shape[-2:]
    if abs(dy) >= h or abs(dx) >= w:
        return None
    first = (..., slice(max(0, -dy), h - max(0, dy)), slice(max(0, -dx), w - max(0, dx)))
    second = (..., slice(max(0, dy), h + min(0, dy)), slice(max(0, dx), w + min(0, dx)))
    return first, second


def downsample_colors(images: Tensor, stride: int) -> Tensor:
    """CIE Lab (B, 3, H // stride, W // stride) of RGB images (B, 3, H, W) in [0, 255].

    Averaged over stride x stride pixels and, as in the released code, cut to whole numbers.
    """
    return rgb_to_lab(F.avg_pool2d(images.float(), stride).floor())


def color_edges(
    lab: Tensor, valid: Tensor, shifts: list[tuple[int, int]], threshold: float
) -> tuple[Tensor, Tensor]:
    """Which pairs of neighbours have one colour, once per image.

    The similarity is exp(-|Lab_i - Lab_j| / 2), and 0 where the neighbour is not valid.

    Args:
        lab: (B, 3, h, w).
        valid: (B, h, w) bool; False on padding and other pixels to leave out.
        shifts: T of them, see :func:`half_neighbourhood`.
        threshold: pairs of at least this similarity count.

    Returns:
        two bool tensors (B, T, h, w), at pixel i: whether the pair of i with its neighbour
        j = i + shift counts when i is the centre, and whether it counts when j is. False where
        there is no neighbour.
    """
    shape = (lab.shape[0], len(shifts), *lab.shape[-2:])
    forward = torch.zeros(shape, dtype=torch.bool, device=lab.device)
    backward = torch.zeros_like(forward)
    for t, shift in enumerate(shifts):
        views = _views(lab.shape, shift)
        if views is None:
            continue
        i, j = views
        # Not norm(dim=1), which is twenty times slower on a CPU.
        distance = (lab[i] - lab[j]).square_().sum(dim=1).sqrt_()
        similar = torch.exp(-0.5 * distance) >= threshold
        forward[:, t][i] = similar & valid[j]
        backward[:, t][i] = similar & valid[i]
    return forward, backward


def _affinity(
    logits: Tensor, inside: Tensor, edges: tuple[Tensor, Tensor], shifts: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sums (P,), weight sums (P,) and the gradient (P, h, w) of the former.

    Args:
        logits: (P, h, w) float32.
        inside: (P, h, w) bool or broadcastable, the pixels that are centres of pairs.
        edges: (P or 1, T, h, w) each.
    """
    gradient = torch.zeros_like(logits)
    losses = logits.new_zeros(len(logits))
    counts = logits.new_zeros(len(logits))
    single = F.softplus(logits)
    probability = logits.sigmoid()
    for t, shift in enumerate(shifts):
        views = _views(logits.shape, shift)
        if views is None:
            continue
        i, j = views
        weight = (inside[i] & edges[0][:, t][i]).float() + (inside[j] & edges[1][:, t][i]).float()
        both = logits[i] + logits[j]
        losses += ((single[i] + single[j] - F.softplus(both)) * weight).sum(dim=(1, 2))
        counts += weight.sum(dim=(1, 2))
        both = both.sigmoid_()
        gradient[i] += (probability[i] - both) * weight
        gradient[j] += (probability[j] - both) * weight
    return losses, counts, gradient


def _extent(occupied: Tensor, margin: int) -> list[slice]:
    """Per row of (P, n) bool the slice from its first to its last True, `margin` wider."""
    n = occupied.shape[1]
    numbers = occupied.to(torch.uint8)
    first = numbers.argmax(dim=1)
    last = n - 1 - numbers.flip(1).argmax(dim=1)
    return [
        slice(max(0, a - margin), min(n, b + 1 + margin))
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    ]


def _cropped_blocks(rows: Tensor, columns: Tensor, image: Tensor, margin: int) -> Iterator[tuple]:
    """Runs of masks of one place, with the part of the image that their pairs reach.

    Neighbouring masks of a batch are mostly those of one object, and are computed together.
    """
    places = list(zip(image.tolist(), _extent(rows, margin), _extent(columns, margin), strict=True))
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[begin]:
            owner, y, x = places[begin]
            yield slice(begin, end), slice(owner, owner + 1), y, x
            begin = end


def _whole_blocks(shape: torch.Size, image: Tensor) -> Iterator[tuple]:
    """Chunks of whole masks: a device would have to be waited for to learn the boxes."""
    step = max(1, _CHUNK_ELEMENTS // (shape[1] * shape[2]))
    for begin in range(0, shape[0], step):
        part = slice(begin, begin + step)
        yield part, image[part], slice(0, shape[1]), slice(0, shape[2])


class _PairwiseAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, image, forward_edges, backward_edges, shifts):
        rows, columns = targets.any(dim=2), targets.any(dim=1)
        if logits.device.type == "cpu":
            margin = max(max(abs(dy), abs(dx)) for dy, dx in shifts)
            blocks = _cropped_blocks(rows, columns, image, margin)
        else:
            blocks = _whole_blocks(logits.shape, image)
        gradient = torch.zeros_like(logits)
        losses = logits.new_zeros(len(logits))
        counts = logits.new_zeros(len(logits))
        for masks, images, y, x in blocks:
            inside = rows[masks, y, None] & columns[masks, None, x]
            edges = tuple(e[:, :, y, x][images] for e in (forward_edges, backward_edges))
            losses[masks], counts[masks], gradient[masks, y, x] = _affinity(
                logits[masks, y, x], inside, edges, shifts
            )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses, _grad_counts):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_losses[:, None, None], None, None, None, None, None


def pairwise_affinity(
    logits: Tensor,
    targets: Tensor,
    image: Tensor,
    edges: tuple[Tensor, Tensor],
    shifts: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Sums of the pairwise losses of each mask, and how many pairs there are.

    The pairs of a mask have their centre in the rows and columns that its target occupies (its
    box, unless it has gaps); their other end may lie outside.

    Args:
        logits: (P, h, w) float; computed in float32.
        targets: (P, h, w) bool. Only their projections on the axes are used.
        image: (P,) int64, which of the B images.
        edges: of :func:`color_edges`, (B, T, h, w) each.
        shifts: as given to :func:`color_edges`.

    Returns:
        (P,) float32 loss sums, differentiable once, and (P,) float32 numbers of pairs.
    """
    return _PairwiseAffinity.apply(logits.float(), targets, image, *edges, shifts)
