"""Where InstanceFCN's windows lie: one of m x m cells around each cell of a map.

Dai et al., "Instance-sensitive fully convolutional networks" (2016), section 3. Coordinates are
edges of pixels: pixel p covers [p, p + 1).

Legend: B images, N windows, m cells per side of a window, h w cells of a map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from unseg.layers import assemble_instances

# A window's side over the longest side of the object it is made for: 168 / 128 in the paper.
_WINDOW_PER_OBJECT = 1.3125


@dataclass(frozen=True)
class WindowLevel:
    """A map whose cells are the centres of windows.

    Attributes:
        stride: pixels from cell to cell.
        offset: pixels from the image's edge to the centre of the first cell.
        object_size: longest side in pixels of the object that a window is made for.
    """

    stride: int
    offset: float
    object_size: float

    def cells_inside(
        self, image_size: tuple[int, int], map_size: tuple[int, int]
    ) -> tuple[int, int]:
        """Rows and columns of the map that are of the image: a stride of the others is padding."""
        rows, columns = (
            min(cells, -(-side // self.stride))
            for side, cells in zip(image_size, map_size, strict=True)
        )
        return rows, columns

    def centers(self, cells: Tensor) -> Tensor:
        """Float32 (N, 2), x and y in pixels, of cells (N, 2), row and column."""
        return cells.flip(1).to(torch.float32) * self.stride + self.offset

    def boxes(self, cells: Tensor, m: int) -> Tensor:
        """Float32 (N, 4) XYXY of the windows around cells (N, 2), row and column."""
        centers = self.centers(cells)
        half = m * self.stride / 2
        return torch.cat([centers - half, centers + half], dim=1)


def make_levels(
    shapes: Mapping[str, ShapeSpec],
    in_features: Sequence[str],
    m: int,
    object_size: float = 0.0,
    cell_offset: float = -1.0,
    cell_offsets: Mapping[str, float] | None = None,
) -> list[WindowLevel]:
    """The levels of some maps of a backbone.

    Args:
        shapes: the maps' strides.
        in_features: names of the maps.
        m: see the legend.
        object_size: of the map with the smallest stride, the others' in proportion to their
            strides; 0: ``m * stride / 1.3125``.
        cell_offset: see :class:`WindowLevel`; negative: as `cell_offsets` says, else half a stride.
        cell_offsets: what the backbone says.

    Raises:
        ValueError: a map is missing, or one offset is given for several maps; the message names
            the config's key.
    """
    if not in_features or any(name not in shapes for name in in_features):
        raise ValueError(
            f"MODEL.INSTANCE_FCN.IN_FEATURES must name some of the backbone's maps, "
            f"{', '.join(shapes)}: {tuple(in_features)}"
        )
    if cell_offset >= 0 and len(in_features) > 1:
        raise ValueError(
            f"MODEL.INSTANCE_FCN.CELL_OFFSET must be -1 for several maps: {cell_offset}"
        )
    finest = min(shapes[name].stride for name in in_features)
    size = object_size or m * finest / _WINDOW_PER_OBJECT
    levels = []
    for name in in_features:
        stride = shapes[name].stride
        offset = cell_offset if cell_offset >= 0 else (cell_offsets or {}).get(name, stride / 2)
        levels.append(WindowLevel(stride, float(offset), size * stride / finest))
    return levels


def grid_cells(rows: int, columns: int, device: torch.device) -> Tensor:
    """Int64 (rows * columns, 2): row and column of each cell, row by row."""
    y = torch.arange(rows, device=device).repeat_interleave(columns)
    return torch.stack([y, torch.arange(columns, device=device).repeat(rows)], dim=1)


def cells_of_windows_inside(locations: Tensor, sizes: Sequence[tuple[int, int]], m: int) -> Tensor:
    """Bool (N, m, m): True where a window's cell is one of its image's.

    Args:
        locations: int64 (N, 3): image, row and column.
        sizes: rows and columns of the map that are of each image.
        m: see the legend.
    """
    device = locations.device
    limits = torch.tensor(sizes, device=device).view(-1, 2)[locations[:, 0]]
    steps = torch.arange(m, device=device) - (m - 1) // 2
    rows, columns = (locations[:, axis, None] + steps for axis in (1, 2))
    rows_in = (rows >= 0) & (rows < limits[:, :1])
    columns_in = (columns >= 0) & (columns < limits[:, 1:])
    return rows_in[:, :, None] & columns_in[:, None, :]


def assemble_windows(
    maps: Tensor,
    locations: Tensor,
    sizes: Sequence[tuple[int, int]],
    k: int,
    m: int,
    pad_logit: float,
) -> tuple[Tensor, Tensor]:
    """Mask logits of windows of a padded batch, whose padding is outside the maps.

    Args:
        maps: (B, k*k, h, w).
        locations: int64 (N, 3): image, row and column.
        sizes: rows and columns of the map that are of each image.
        k, m, pad_logit: of :func:`unseg.layers.assemble_instances`.

    Returns:
        float32 (N, m, m); and bool (N, m, m), True where a cell is one of the image's.
    """
    inside = cells_of_windows_inside(locations, sizes, m)
    logits = assemble_instances(maps, locations, k, m, pad_logit).float()
    return logits.masked_fill(~inside, pad_logit), inside
