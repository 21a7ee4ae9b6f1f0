"""Loads the compiled ops (`unseg._C`, registered as ``torch.ops.unseg``).

Importing this module loads the extension unless ``UNSEG_NO_EXT=1`` is set or it was not built. The
fake kernels here tell torch.compile, export and meta tensors the shapes of the results.

Dimensions: N, M masks, H W image, n rows of C features.
"""

import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Numbered as in csrc/mask_ops.h.
MODES = {"iou": 0, "iomin": 1, "ioa": 2, "iob": 3, "inter": 4}
KERNELS = {"gaussian": 0, "linear": 1}
META_FIELDS = 8  # area, x0, y0, x1, y1, first word, last word + 1, 0
WORD_GROUP = 8


def row_words(pixels: int) -> int:
    """Number of 64-bit words that hold `pixels` bits, rounded up to whole groups."""
    group = 64 * WORD_GROUP
    return (pixels + group - 1) // group * WORD_GROUP


def _load() -> bool:
    if os.environ.get("UNSEG_NO_EXT", "0") == "1":
        return False
    if importlib.util.find_spec("unseg._C") is None:
        logger.info("unseg was built without its extension: its ops run as plain PyTorch")
        return False
    try:
        from unseg import _C  # noqa: F401 (importing it registers the ops)
    except ImportError as error:
        logger.warning(
            "unseg._C does not fit this torch (%s): its ops run as plain PyTorch. Reinstall with "
            "`pip install --no-build-isolation -e .`",
            error,
        )
        return False
    return True


def _register_fakes() -> None:
    """Shapes and types of the results, from shapes alone."""

    def packed(like: Tensor, count: int, pixels: int) -> tuple[Tensor, Tensor]:
        bits = like.new_empty((count, row_words(pixels)), dtype=torch.int64)
        return bits, like.new_empty((count, META_FIELDS), dtype=torch.int32)

    @torch.library.register_fake("unseg::pack_masks")
    def _(masks, threshold):
        return packed(masks, masks.shape[0], masks.shape[1] * masks.shape[2])

    @torch.library.register_fake("unseg::pack_rle")
    def _(data, offsets, height, width):
        return packed(data, offsets.shape[0] - 1, height * width)

    @torch.library.register_fake("unseg::mask_overlap")
    def _(masks1, meta1, labels1, masks2, meta2, labels2, mode):
        columns = masks1.shape[0] if masks2 is None else masks2.shape[0]
        dtype = torch.int32 if mode == MODES["inter"] else torch.float32
        return masks1.new_empty((masks1.shape[0], columns), dtype=dtype)

    @torch.library.register_fake("unseg::mask_nms")
    def _(masks, meta, labels, scores, iou_threshold, mode):
        count = masks.shape[0]
        keep = masks.new_empty((count,), dtype=torch.bool)
        ranked = masks.new_empty((count,), dtype=torch.int64)
        return keep, ranked, masks.new_empty((), dtype=torch.int64)

    @torch.library.register_fake("unseg::matrix_nms")
    def _(masks, meta, labels, scores, kernel, sigma):
        return masks.new_empty((masks.shape[0],), dtype=torch.float32)

    if "boc_affinity" in _OPS:

        @torch.library.register_fake("unseg::boc_affinity")
        def _(features):
            dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
            return features.new_empty((features.shape[0], features.shape[0]), dtype=dtype)


_LOADED = _load()
# Later than the first build: an extension compiled from older sources may lack them.
_OPS = frozenset(name for name in ("boc_affinity",) if hasattr(torch.ops.unseg, name))
# Device types with compiled kernels; "meta" is served by the fake ones.
_DEVICES: frozenset[str] = frozenset()
if _LOADED:
    _register_fakes()
    _DEVICES = frozenset({"cpu", "meta"})
    if torch._C._dispatch_has_kernel_for_dispatch_key("unseg::pack_masks", "CUDA"):
        _DEVICES |= {"cuda"}


def has_native(device: torch.device | str = "cpu") -> bool:
    """Whether compiled ops are loaded for tensors on `device`.

    Without them the same functions run as plain PyTorch, on the tensors' own device, with the same
    results. False after ``UNSEG_NO_EXT=1`` in the environment at import.
    """
    kind = device.split(":")[0] if isinstance(device, str) else device.type
    return kind in _DEVICES


def has_op(name: str, device: torch.device | str = "cpu") -> bool:
    """Whether the compiled op `name`, one of those added later, is loaded for `device`.

    An extension built from older sources has the mask ops but not the later ones: these then run
    as plain PyTorch, as without an extension.
    """
    return name in _OPS and has_native(device)


def backend(device: torch.device | str = "cpu") -> str:
    """What the ops run on for tensors on `device`.

    ``"avx512"``, ``"avx2"``, ``"popcnt"`` or ``"portable"`` for the CPU kernels: the best that the
    processor has, at most what the environment variable ``UNSEG_MASK_ISA`` names. ``"cuda"`` for
    the CUDA kernels, ``"pytorch"`` without compiled ones.
    """
    kind = torch.device(device).type
    if not has_native(device):
        return "pytorch"
    return torch.ops.unseg.mask_isa() if kind == "cpu" else kind
