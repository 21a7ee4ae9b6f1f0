"""Which grid cells learn which object (SOLO's centre sampling, on FreeSOLO's levels).

Legend: B images, N objects of an image, L levels, S cells per side, K cells of all levels of an
image, P (cell, object) pairs of a batch, H W input pixels, h w mask pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 32  # masks of full size are made floats, so many at a time


@dataclass(frozen=True)
class GridSpec:
    """How objects are dealt to levels and cells.

    Attributes:
        num_grids: S of each level.
        scale_ranges: range of sqrt(box area) in pixels of each level, inclusive.
        sigma: cells within this fraction of the box around the mask's centre are positive.
    """

    num_grids: Sequence[int]
    scale_ranges: Sequence[tuple[float, float]]
    sigma: float = 0.2

    def __post_init__(self):
        if len(self.num_grids) != len(self.scale_ranges):
            raise ValueError(
                f"MODEL.FREESOLO: {len(self.num_grids)} NUM_GRIDS and {len(self.scale_ranges)} "
                "FPN_SCALE_RANGES"
            )

    @property
    def num_cells(self) -> int:
        """K: cells of all levels, level by level, row by row."""
        return sum(s * s for s in self.num_grids)


@dataclass(frozen=True)
class Pairs:
    """The P positive (cell, object) pairs of a batch, in order of image, object, level, cell.

    Attributes:
        image, level: (P,) int64.
        cell: (P,) int64 among the K cells of the image.
        target: (P,) int64, the object among all objects of the batch.
        counts: pairs per image, on the host.
    """

    image: Tensor
    level: Tensor
    cell: Tensor
    target: Tensor
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(self.image)


def mask_centers(masks: Tensor) -> Tensor:
    """Centres of mass (N, 2) as (x, y) pixel indices; (0, 0) for empty masks.

    Args:
        masks: (N, H, W) bool.
    """
    # Sums over rows and columns first: the coordinates then meet vectors, not images.
    columns = masks.sum(dim=1, dtype=torch.float32)
    rows = masks.sum(dim=2, dtype=torch.float32)
    area = rows.sum(dim=1).clamp(min=1)
    x = torch.arange(masks.shape[2], dtype=torch.float32, device=masks.device)
    y = torch.arange(masks.shape[1], dtype=torch.float32, device=masks.device)
    return torch.stack([columns @ x, rows @ y], dim=1) / area[:, None]


def assign_cells(
    boxes: Tensor, centers: Tensor, valid: Tensor, size: tuple[int, int], spec: GridSpec
) -> Tensor:
    """The 3 x 3 cells around each object's centre that it takes, per level.

    Args:
        boxes: (N, 4) XYXY in pixels.
        centers: (N, 2), see :func:`mask_centers`.
        valid: (N,) bool, False for objects to leave out (empty masks).
        size: (H, W) that the grids cover: the padded image.
        spec: levels and grids.

    Returns:
        (N, L, 9) int64, index among the K cells; -1 for none.
    """
    device = boxes.device
    grids = torch.tensor(spec.num_grids, device=device)  # (L,)
    ranges = torch.tensor(spec.scale_ranges, dtype=torch.float32, device=device)
    offsets = torch.cumsum(grids**2, 0) - grids**2
    sides = boxes[:, 2:] - boxes[:, :2]
    scale = (sides[:, 0] * sides[:, 1]).clamp(min=0).sqrt()[:, None]
    on_level = (scale >= ranges[:, 0]) & (scale <= ranges[:, 1]) & valid[:, None]  # (N, L)

    extent = torch.tensor([size[1], size[0]], dtype=torch.float64, device=device)

    def cell_of(points: Tensor) -> Tensor:
        """(N, 2) pixels -> (N, L, 2) column and row of the cell."""
        return (points.double()[:, None] * grids[:, None] / extent).floor().long()

    half = 0.5 * spec.sigma * sides
    last = (grids - 1)[None, :, None]
    center = cell_of(centers)
    low = torch.maximum(cell_of(centers - half).clamp(min=0), center - 1)
    high = torch.minimum(torch.minimum(cell_of(centers + half), last), center + 1)
    steps = torch.arange(-1, 2, device=device)
    x = center[:, :, None, None, 0] + steps[None, None, None, :]  # (N, L, 1, 3)
    y = center[:, :, None, None, 1] + steps[None, None, :, None]  # (N, L, 3, 1)
    inside_x = (x >= low[:, :, None, None, 0]) & (x <= high[:, :, None, None, 0])
    inside_y = (y >= low[:, :, None, None, 1]) & (y <= high[:, :, None, None, 1])
    inside = inside_x & inside_y & on_level[:, :, None, None]
    cells = offsets[:, None, None] + y * grids[:, None, None] + x
    return torch.where(inside, cells, -1).flatten(2)


def make_pairs(assigned: Sequence[Tensor]) -> Pairs:
    """All pairs of a batch.

    Args:
        assigned: per image what :func:`assign_cells` gave, (N, L, 9).
    """
    # The one place where a training step waits for the device: it must learn how many there are.
    counts = torch.stack([(a >= 0).sum() for a in assigned]).tolist()
    device = assigned[0].device
    objects = torch.tensor([len(a) for a in assigned], device=device)
    image = torch.repeat_interleave(
        torch.arange(len(assigned), device=device),
        objects,
        output_size=sum(len(a) for a in assigned),
    )
    cells = torch.cat(list(assigned))
    target, level, position = (cells >= 0).nonzero(as_tuple=True)
    return Pairs(
        image=image[target],
        level=level,
        cell=cells[target, level, position],
        target=target,
        counts=counts,
    )


def nearest_pairs(pairs: Pairs, centers: Tensor, size: tuple[int, int], spec: GridSpec) -> Tensor:
    """For each object the pair whose cell's centre is the nearest to the object's.

    Args:
        pairs: of the batch.
        centers: (N, 2) of all objects of the batch, see :func:`mask_centers`.
        size: (H, W) that the grids cover.
        spec: levels and grids.

    Returns:
        (N,) int64, the first of equally near ones, -1 for objects without a pair.
    """
    device = centers.device
    grids = torch.tensor(spec.num_grids, device=device)
    offsets = torch.cumsum(grids**2, 0) - grids**2
    grid, cell = grids[pairs.level], pairs.cell - offsets[pairs.level]
    column_row = torch.stack([cell % grid, cell // grid], dim=1)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float64, device=device)
    points = (column_row + 0.5) * extent / grid[:, None]
    # Pixel indices are the pixels' upper left corners.
    distance = (points - centers[pairs.target].double() - 0.5).norm(dim=1)
    none = len(pairs)
    least = distance.new_full((len(centers),), torch.inf)
    least.scatter_reduce_(0, pairs.target, distance, reduce="amin")
    index = torch.arange(none, device=device)
    candidates = torch.where(distance == least[pairs.target], index, none)
    first = pairs.target.new_full((len(centers),), none)
    first.scatter_reduce_(0, pairs.target, candidates, reduce="amin")
    return torch.where(first < none, first, -1)


def last_object_of_cells(pairs: Pairs, num_images: int, num_cells: int) -> Tensor:
    """(B, K) int64: the last object (in order of the batch) that claims each cell, -1 for none.

    Where objects share a cell the later one gives it its embedding; pairs keep both masks.
    """
    owner = pairs.target.new_full((num_images * num_cells,), -1)
    index = pairs.image * num_cells + pairs.cell
    owner.scatter_reduce_(0, index, pairs.target, reduce="amax")
    return owner.view(num_images, num_cells)


def downsample_masks(masks: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Masks at the resolution of the mask features.

    Args:
        masks: (N, H, W) bool, in input pixels.
        stride: pixels per mask pixel.
        size: (h, w) of the mask features, which cover the padded image.

    Returns:
        (N, h, w) bool: bilinear samples at the centres of the larger pixels, at least 0.5.
    """
    n, height, width = masks.shape
    h, w = (max(1, int(side / stride + 0.5)) for side in (height, width))
    if n == 0:
        return masks.new_zeros((0, *size))
    # Channels, not images, of one image: a layout whose resizing is vectorised.
    small = torch.cat(
        [
            F.interpolate(x[None].float(), size=(h, w), mode="bilinear", align_corners=False)[0]
            >= 0.5
            for x in masks.split(_CHUNK)
        ]
    )
    return F.pad(small, (0, size[1] - w, 0, size[0] - h))
