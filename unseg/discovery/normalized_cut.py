"""Objects by normalised cuts of the graph of patches: TokenCut (Wang et al., "Self-Supervised
Transformers for Unsupervised Object Discovery using Normalized Cut", CVPR 2022) and MaskCut (Wang
et al., "Cut and Learn for Unsupervised Object Detection and Instance Segmentation", CVPR 2023).

Both papers refine their masks afterwards, MaskCut's with a CRF, TokenCut's with a bilateral solver
where it reports masks. Neither is done here: these are the masks of the patches. What the papers
leave open, and was decided here, is marked [ours].

Legend: C channels, h w patches of the grid, n = h*w patches, H W image pixels, N masks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from unseg.discovery.features import patch_rows
from unseg.discovery.regions import connected_components
from unseg.discovery.registry import DISCOVERERS, FunctionDiscoverer
from unseg.discovery.spectral.eigen import SOLVERS, laplacian_eigenpairs
from unseg.structures import PseudoMask, make_pseudo_masks

UPSAMPLE_MODES = ("nearest", "bilinear")
# Scores are above 0, also where rounding says otherwise.
_MIN_SCORE = 1e-6
# Patches with the same neighbours have the same value, but for the rounding of the eigensolver.
_TIE = 1e-4


@dataclass(frozen=True)
class TokenCutSettings:
    """Constants of the method; the defaults are the paper's. See unseg/config/discovery.py.

    Raises:
        ValueError: a value that means nothing.
    """

    threshold: float = 0.2
    floor: float = 1e-5
    connectivity: int = 4
    upsample: str = "nearest"
    solver: str = "auto"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TokenCutSettings":
        return cls(**{key.lower(): value for key, value in cfg.DISCOVERY.TOKENCUT.items()})

    def __post_init__(self) -> None:
        _one_of("connectivity", self.connectivity, (4, 8))
        _one_of("upsample", self.upsample, UPSAMPLE_MODES)
        _one_of("solver", self.solver, SOLVERS)
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {self.floor}")


@dataclass(frozen=True)
class MaskCutSettings(TokenCutSettings):
    """Constants of the method; the defaults are the paper's, for COCO and ImageNet."""

    threshold: float = 0.15
    max_masks: int = 3
    max_corners: int = 2
    exclude_found: bool = False
    max_iou: float = 0.5
    min_area: float = 0.01

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "MaskCutSettings":
        return cls(**{key.lower(): value for key, value in cfg.DISCOVERY.MASKCUT.items()})


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def binary_affinity(descriptors: Tensor, threshold: float, floor: float) -> Tensor:
    """1 where the cosine of two descriptors exceeds `threshold`, else `floor`.

    Args:
        descriptors: (n, C) float. The cosine with a descriptor of zeros is 0.

    Returns:
        (n, n) float, symmetric. At most two such matrices are held at a time.
    """
    unit = F.normalize(descriptors, dim=1)
    weights = (unit @ unit.t()).gt_(threshold)
    # A product of matrices rounds (i, j) and (j, i) differently: beside the threshold they may
    # fall apart, and the eigensolvers want a symmetric matrix.
    weights = torch.maximum(weights, weights.t())
    return weights.clamp_(min=floor)


def choose_side(
    values: np.ndarray, candidates: np.ndarray, max_corners: int
) -> tuple[np.ndarray, int]:
    """Which side of the candidates' mean is the foreground, and its seed.

    The side of the patch of the largest absolute value, unless that side has more than
    `max_corners` corners of the grid: then the other one. [ours] The two rules are applied one
    after the other, so that the eigenvector's sign, which is arbitrary, does not matter; the seed
    of a side that was changed is its patch farthest from the mean; of patches with (almost) the
    same value the first by rows is the seed, as otherwise rounding would choose.

    Args:
        values: (h, w) float, an eigenvector.
        candidates: (h, w) bool, the patches that may be foreground, one at least.

    Returns:
        foreground (h, w) bool, and the seed's index into the flattened grid. The foreground is
        empty if the candidates have one value.
    """
    mean = values[candidates].mean()
    seed = _first_of_largest(np.abs(values), candidates)
    sign = 1.0 if values.flat[seed] > mean else -1.0
    foreground = candidates & (sign * values > sign * mean)
    if foreground[[0, 0, -1, -1], [0, -1, 0, -1]].sum() > max_corners:
        foreground = candidates & (-sign * values > -sign * mean)
        seed = _first_of_largest(-sign * (values - mean), foreground)
    return foreground, seed


def _first_of_largest(values: np.ndarray, among: np.ndarray) -> int:
    """Flat index of the first of the largest values, which are positive; 0 if there are none."""
    values = np.where(among, values, 0.0)
    return int((values >= (1 - _TIE) * values.max()).argmax())


def _cut(
    descriptors: Tensor,
    candidates: np.ndarray,
    settings: TokenCutSettings,
    max_corners: int,
) -> tuple[np.ndarray, float] | None:
    """One object (h, w) bool and how well it is set off; None if the graph has no structure."""
    count = int(candidates.sum())
    weights = binary_affinity(descriptors, settings.threshold, settings.floor)
    strong = int((weights == 1).sum()) - int((weights.diagonal() == 1).sum())
    if strong in (0, count * (count - 1)):  # every cut is as good as any other
        return None
    vector = laplacian_eigenpairs(weights, 2, solver=settings.solver)[1][:, 1]
    values = vector.double().cpu().numpy().reshape(candidates.shape)
    foreground, seed = choose_side(values, candidates, max_corners)
    if not foreground.any():
        return None
    labels, _ = connected_components(foreground, connectivity=settings.connectivity)
    mask = labels == labels.flat[seed]
    return mask, _contrast(weights, torch.from_numpy(mask.ravel()).to(weights))


def _contrast(weights: Tensor, inside: Tensor) -> float:
    """[ours] The share of an object's weight that stays inside it, times the share of the graph's
    weight that is not the object's: assoc(A, A) / assoc(A, V) * assoc(V - A, V) / assoc(V, V).

    Args:
        weights: (n, n) of the graph V.
        inside: (n,) 0 or 1, the object A.

    Returns:
        in (0, 1): small for what is cut badly and for most of the image.
    """
    reach = weights @ inside
    volume = float(reach.sum(dtype=torch.float64))  # the weights are symmetric
    if volume == 0:  # a patch without features and a floor of 0
        return _MIN_SCORE
    total = float(weights.sum(dtype=torch.float64))
    return max(float(reach @ inside) / volume * (1 - volume / total), _MIN_SCORE)


def _to_image(
    masks: Sequence[np.ndarray],
    scores: Sequence[float],
    image_size: tuple[int, int],
    settings: TokenCutSettings,
    dropped: Counter,
) -> list[PseudoMask]:
    """Masks of patches as masks of pixels; those that have no pixel are dropped."""
    if not masks:
        return []
    planes = torch.from_numpy(np.stack(masks)).float()[None]
    if settings.upsample == "nearest":
        # A pixel is of the patch that it lies in, also where the sizes do not divide.
        planes = F.interpolate(planes, size=image_size, mode="nearest-exact")
    else:
        planes = F.interpolate(planes, size=image_size, mode="bilinear", align_corners=False)
    pixels = planes[0] >= 0.5
    visible = pixels.flatten(1).any(dim=1)
    dropped["empty"] += int((~visible).sum())
    return make_pseudo_masks(pixels[visible], torch.tensor(scores)[visible])


@torch.no_grad()
def token_cut(
    features: Tensor,
    image_size: tuple[int, int],
    settings: TokenCutSettings,
    *,
    dropped: Counter | None = None,
) -> list[PseudoMask]:
    """Find the most salient object of one image.

    The second eigenvector of the graph of patches is split at its mean; the object is the connected
    part with the patch of its largest absolute value.

    Args:
        features: (C, h, w) float, dense features on a grid that covers the image.
        image_size: (H, W) in pixels; the size of the masks.
        settings: constants of the method.
        dropped: counts, by reason, of the candidates that were dropped are added to it.

    Returns:
        one mask, or none if the features have no structure. Its score is that of :func:`_contrast`.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite.
    """
    dropped = Counter() if dropped is None else dropped
    descriptors = patch_rows(features)
    everywhere = np.ones(tuple(features.shape[1:]), dtype=bool)
    found = _cut(descriptors, everywhere, settings, max_corners=4)
    if found is None:
        dropped["no structure"] += 1
        return []
    mask, score = found
    return _to_image([mask], [score], image_size, settings, dropped)


def _overlap(mask: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """The largest IoU with any of the others."""
    return max([(mask & other).sum() / (mask | other).sum() for other in others], default=0.0)


@torch.no_grad()
def mask_cut(
    features: Tensor,
    image_size: tuple[int, int],
    settings: MaskCutSettings,
    *,
    dropped: Counter | None = None,
) -> list[PseudoMask]:
    """Find several objects of one image, one after the other, without the paper's CRF.

    As :func:`token_cut`; what has been found is taken out of the graph by setting its features to
    zero, and the rest is cut again. [ours]: the features of a mask that is dropped are set to zero
    as well, or the rounds to come would find it again; areas are fractions of the patches.

    Patches without features stay nodes of the graph, and nothing in the paper keeps them out of the
    next foreground: all of them have one value, which is on the side of the mean's sign and may
    even be the largest. Masks that are mostly such patches are dropped by their IoU.
    ``settings.exclude_found`` [ours, off by default] excludes them from the mean, the seed and the
    foreground.

    Args:
        features: (C, h, w) float, dense features on a grid that covers the image.
        image_size: (H, W) in pixels; the size of the masks.
        settings: constants of the method.
        dropped: counts, by reason, of the candidates that were dropped are added to it.

    Returns:
        at most N = ``settings.max_masks`` masks in the order in which they were found. The scores
        are [ours]: (N - t + c) / N for round t = 1, 2, ..., with c of :func:`_contrast`. So they
        fall from round to round, and c ranks the masks of one round.

    Raises:
        ValueError: `features` is not (C, h, w) or not finite.
    """
    dropped = Counter() if dropped is None else dropped
    descriptors = patch_rows(features)
    candidates = np.ones(tuple(features.shape[1:]), dtype=bool)
    found: list[np.ndarray] = []
    kept, scores = [], []
    for left in reversed(range(settings.max_masks)):
        cut = _cut(descriptors, candidates, settings, settings.max_corners)
        if cut is None:
            dropped["no structure"] += 1
            break
        mask, contrast = cut
        if _overlap(mask, found) > settings.max_iou:
            dropped["found before"] += 1
        elif mask.mean() <= settings.min_area:
            dropped["too small"] += 1
        else:
            kept.append(mask)
            scores.append((left + contrast) / settings.max_masks)
        found.append(mask)
        if settings.exclude_found:
            candidates = candidates & ~mask
        gone = torch.from_numpy(mask.ravel()).to(descriptors.device)
        descriptors = descriptors.masked_fill(gone[:, None], 0.0)
    return _to_image(kept, scores, image_size, settings, dropped)


@DISCOVERERS.register()
class TokenCut(FunctionDiscoverer):
    """:func:`token_cut` as a discoverer, with the settings of ``cfg.DISCOVERY.TOKENCUT``."""

    settings_class = TokenCutSettings
    find = staticmethod(token_cut)


@DISCOVERERS.register()
class MaskCut(FunctionDiscoverer):
    """:func:`mask_cut` as a discoverer, with the settings of ``cfg.DISCOVERY.MASKCUT``: MaskCut
    without a CRF."""

    settings_class = MaskCutSettings
    find = staticmethod(mask_cut)
