"""Where DeepMask's windows are, in training patches and in a resized image.

Source: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), sections 3.1 and
3.3. Pixel p covers [p, p + 1); boxes are XYXY.
"""

from dataclasses import dataclass

from detectron2.config import CfgNode

from unseg.data.patches import canonical_object_size
from unseg.data.square_crop import GREY

__all__ = ["GREY", "PatchGeometry"]


@dataclass(frozen=True)
class PatchGeometry:
    """Sizes of a patch, of its mask and of the object in it.

    Attributes:
        input_size: side in pixels of the window whose mask is predicted; even.
        context: pixels, both sides together, that the trunk sees besides in training.
        out_size: side of the predicted mask.
        gt_size: side of the mask that the loss compares.
        align_corners: how masks are upsampled and pasted.
        object_size: longest side of an object that fits; 0 stands for input_size * 128 / 224,
            rounded up.

    Raises:
        ValueError: a size is out of range; the message names the config's key.
    """

    input_size: int = 160
    context: int = 32
    out_size: int = 56
    gt_size: int = 112
    align_corners: bool = False
    object_size: int = 0

    def __post_init__(self) -> None:
        for key in ("input_size", "out_size", "gt_size"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"MODEL.DEEPMASK.{key.upper()} must be positive: {getattr(self, key)}"
                )
        if self.input_size % 2:
            raise ValueError(
                f"MODEL.DEEPMASK.INPUT_SIZE must be even, half of it is padded: {self.input_size}"
            )
        for key in ("context", "object_size"):
            if getattr(self, key) < 0:
                raise ValueError(
                    f"MODEL.DEEPMASK.{key.upper()} must not be negative: {getattr(self, key)}"
                )
        if not self.object_size:
            object.__setattr__(self, "object_size", canonical_object_size(self.input_size))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "PatchGeometry":
        node = cfg.MODEL.DEEPMASK
        return cls(
            input_size=node.INPUT_SIZE,
            context=node.CONTEXT,
            out_size=node.OUT_SIZE,
            gt_size=node.GT_SIZE,
            align_corners=node.ALIGN_CORNERS,
            object_size=node.OBJECT_SIZE,
        )

    @property
    def patch_size(self) -> int:
        """Side of a training patch."""
        return self.input_size + self.context

    def cells(self, stride: int) -> int:
        """Cells per side of a window, on a map of that stride.

        Raises:
            ValueError: the window or its context does not consist of whole cells.
        """
        if self.input_size % stride:
            raise ValueError(
                f"MODEL.DEEPMASK.INPUT_SIZE must be a multiple of {stride}, the stride of "
                f"MODEL.DEEPMASK.IN_FEATURE: {self.input_size}"
            )
        if self.context % (2 * stride):
            raise ValueError(
                f"MODEL.DEEPMASK.CONTEXT must be a multiple of {2 * stride}, twice the stride of "
                f"MODEL.DEEPMASK.IN_FEATURE: {self.context}"
            )
        return self.input_size // stride

    def padding(self, height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
        """Pixels to put left, right, above and below a resized image.

        Half a window on every side, and at the right and below as much as makes the sides
        multiples of `multiple`: a trunk that rounds down loses no window.
        """
        half = self.input_size // 2
        right = half + -(width + self.input_size) % multiple
        below = half + -(height + self.input_size) % multiple
        return half, right, half, below

    def grid(self, height: int, width: int, stride: int) -> tuple[int, int]:
        """Rows and columns of windows on a resized image.

        The window at (i, j) is centred on (stride * j, stride * i), x and y.
        """
        cells = self.cells(stride)
        rows, columns = (-(-(side + self.input_size) // stride) for side in (height, width))
        return rows - cells + 1, columns - cells + 1
