"""Spectral segmentation as a Detectron2 model ("Deep Spectral Improvement for Unsupervised Image
Instance Segmentation", Arefi, Mansourian and Kasaei, 2024). Nothing is trained.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

from unseg.discovery.spectral import (
    Segments,
    Spectral,
    SpectralSettings,
    segment,
    segments_to_masks,
)
from unseg.modeling.meta_arch.mask_discovery import (
    MaskDiscovery,
    covered_size,
    image_size,
    to_instances,
)
from unseg.structures import GRID_MODES, GridLabels, PseudoMask, pad_pseudo_masks, sample_on_grid

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class DeepSpectral(MaskDiscovery):
    """MaskDiscovery by :func:`unseg.discovery.spectral_masks`, which also gives its patch labels
    and may be told how many instances to look for."""

    @configurable
    def __init__(
        self,
        *,
        settings: SpectralSettings,
        oracle_sampling: str = "center",
        output_intermediates: bool = False,
        **parts: Any,
    ):
        """
        Args:
            settings: of the method.
            oracle_sampling: how an ``instance_map`` is reduced to the patch grid, see
                :func:`unseg.structures.sample_on_grid`.
            output_intermediates: see :meth:`forward`.
            parts: backbone, in_feature, pixel_mean, pixel_std and max_patches of MaskDiscovery.

        Raises:
            ValueError: an unknown `oracle_sampling`.
        """
        if oracle_sampling not in GRID_MODES:
            raise ValueError(
                f"DEEP_SPECTRAL.CLUSTERS.ORACLE_SAMPLING must be one of {GRID_MODES}, "
                f"got {oracle_sampling!r}"
            )
        super().__init__(discoverer=Spectral(settings), **parts)
        self.settings = settings
        self.oracle_sampling = oracle_sampling
        self.output_intermediates = output_intermediates

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DEEP_SPECTRAL
        return {
            "backbone": build_backbone(cfg),
            "in_feature": cfg.DISCOVERY.IN_FEATURE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_patches": cfg.DISCOVERY.MAX_PATCHES,
            "settings": SpectralSettings.from_config(cfg),
            "oracle_sampling": node.CLUSTERS.ORACLE_SAMPLING,
            "output_intermediates": node.OUTPUT_INTERMEDIATES,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: dicts with ``image`` (3, H, W) and, optionally, the ``height`` and
                ``width`` of the image file. With CLUSTERS.MODE "oracle" also ``num_instances``, or
                ``instance_map`` (H, W) int at the size of the file, 0 for background (from
                INPUT.MAPPER OracleMapper): then those count that are left on the patch grid.

        Returns:
            per image a dict with ``instances`` as MaskDiscovery has it and ``grid_labels``
            (GridLabels on the patch grid). With `output_intermediates`, unless the image is of one
            colour, also ``segments`` (:class:`unseg.discovery.spectral.Segments`).

        Raises:
            RuntimeError: the model is in training mode; nothing here can be trained.
            ValueError: the oracle's number is in no input.
        """
        if self.training:
            raise RuntimeError(
                "DeepSpectral has nothing to train: use it in eval mode, or write pseudo-masks "
                "with unseg.tools.pseudo_masks and train a model on them"
            )
        sizes = [image_size(x) for x in batched_inputs]
        results = [
            {
                "instances": to_instances([], size).to(self.device),
                "grid_labels": self._nothing(x["image"].shape[1:]),
            }
            for x, size in zip(batched_inputs, sizes, strict=True)
        ]
        for index, segments, extent in self._segments(batched_inputs):
            masks = self._masks(segments, extent, sizes[index])
            results[index]["instances"] = to_instances(masks, sizes[index]).to(self.device)
            results[index]["grid_labels"] = GridLabels(segments.labels, extent)
            if self.output_intermediates:
                results[index]["segments"] = segments
        return results

    @torch.no_grad()
    def discover(self, batched_inputs: list[dict[str, Any]]) -> list[list[PseudoMask]]:
        """The pseudo-masks of each image; inputs as for :meth:`forward`."""
        found: list[list[PseudoMask]] = [[] for _ in batched_inputs]
        for index, segments, extent in self._segments(batched_inputs):
            found[index] = self._masks(segments, extent, image_size(batched_inputs[index]))
        return found

    def _segments(
        self, batched_inputs: list[dict[str, Any]]
    ) -> Iterator[tuple[int, Segments, tuple[float, float]]]:
        for index, features, extent in self._dense_features(batched_inputs):
            x = batched_inputs[index]
            count = self._oracle(x, tuple(features.shape[1:]), extent)
            segments = segment(features, self.settings, count)
            if segments.reason:
                logger.info("%s: no instances: %s", x.get("file_name", "an image"), segments.reason)
                self.dropped[f"images: {segments.reason}"] += 1
            yield index, segments, extent

    def _nothing(self, size: tuple[int, int]) -> GridLabels:
        """Labels of an image (H, W) that did not go through the backbone."""
        stride = self.backbone.output_shape()[self.in_feature].stride
        grid = [max(1, side // stride) for side in size]
        labels = torch.zeros(grid, dtype=torch.int64, device=self.device)
        return GridLabels(labels, tuple(min(part, 1.0) for part in self._extent(grid, size)))

    def _oracle(
        self, x: dict[str, Any], grid: tuple[int, int], extent: tuple[float, float]
    ) -> int | None:
        """Number of instances to look for, None if the input does not say or it does not matter."""
        if self.settings.clusters.mode != "oracle":
            return None
        if "num_instances" in x:
            return int(x["num_instances"])
        if "instance_map" not in x:
            raise ValueError(
                "CLUSTERS.MODE oracle: the inputs have neither num_instances nor instance_map; set "
                "INPUT.MAPPER OracleMapper, on a data set with annotations"
            )
        on_grid = sample_on_grid(x["instance_map"], grid, extent, self.oracle_sampling)
        return len(set(on_grid.ravel().tolist()) - {0})

    def _masks(
        self, segments: Segments, extent: tuple[float, float], size: tuple[int, int]
    ) -> list[PseudoMask]:
        covered = covered_size(size, extent)
        masks = segments_to_masks(segments, covered, self.settings)
        return pad_pseudo_masks(masks, *size)
