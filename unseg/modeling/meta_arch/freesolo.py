"""FreeSOLO (Wang et al., "FreeSOLO: Learning to Segment Objects without Annotations", CVPR 2022):
SOLOv2 trained on free masks by weak losses.

Legend: B images of a step (both views), K grid cells of all levels, H W input pixels, h w mask
pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from unseg.modeling.losses import downsample_colors
from unseg.modeling.solo.copy_paste import copy_paste
from unseg.modeling.solo.criterion import (
    FreeSOLOLossSettings,
    Predictions,
    Targets,
    flatten_levels,
    freesolo_losses,
)
from unseg.modeling.solo.heads import InstanceHead, MaskHead
from unseg.modeling.solo.postprocess import (
    SoloInferenceSettings,
    find_candidates,
    point_nms,
    suppress,
    to_instances,
)
from unseg.modeling.solo.targets import (
    GridSpec,
    assign_cells,
    downsample_masks,
    make_pairs,
    mask_centers,
)

# Both heads double resolutions from the coarsest level they read up to stride 4.
_SIZE_DIVISIBILITY = 32


@META_ARCH_REGISTRY.register()
class FreeSOLO(nn.Module):
    """One object per grid cell: a category score, a kernel that makes its mask, an embedding.

    The names and shapes of its weights are those of the released checkpoints
    (:func:`unseg.checkpoint.convert`).
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        instance_head: InstanceHead,
        mask_head: MaskHead,
        grid: GridSpec,
        losses: FreeSOLOLossSettings,
        inference: SoloInferenceSettings,
        copy_paste_overlap: float | None,
        append_weak_view: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
    ):
        """
        Args:
            backbone: its outputs hold what the heads read.
            instance_head, mask_head: the heads.
            grid: how objects are dealt to cells.
            losses: weights of the losses.
            inference: thresholds.
            copy_paste_overlap: objects are pasted into the training images unless they cover this
                fraction of one that is there; None pastes nothing.
            append_weak_view: train on weak views besides strong ones.
            pixel_mean, pixel_std: normalisation of the input channels.
            input_format: "RGB" or "BGR", order of the input channels.

        Raises:
            ValueError: the heads and the grids do not fit together.
        """
        super().__init__()
        if tuple(instance_head.num_grids) != tuple(grid.num_grids):
            raise ValueError(
                f"the head has grids {instance_head.num_grids}, the targets {grid.num_grids}"
            )
        self.backbone = backbone
        self.ins_head = instance_head
        self.mask_head = mask_head
        self.grid = grid
        self.losses = losses
        self.inference = inference
        self.copy_paste_overlap = copy_paste_overlap
        self.append_weak_view = append_weak_view
        self.input_format = input_format
        self.divisibility = max(_SIZE_DIVISIBILITY, backbone.size_divisibility)
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        # Training steps so far, for the warm-up of the pairwise loss.
        self.register_buffer("_iter", torch.zeros([1]))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        solo = cfg.MODEL.FREESOLO
        return {
            "backbone": backbone,
            "instance_head": InstanceHead(cfg, backbone.output_shape()),
            "mask_head": MaskHead(cfg, backbone.output_shape()),
            "grid": GridSpec(solo.NUM_GRIDS, solo.FPN_SCALE_RANGES, solo.SIGMA),
            "losses": FreeSOLOLossSettings.from_config(cfg),
            "inference": SoloInferenceSettings.from_config(cfg),
            "copy_paste_overlap": (
                solo.DATA.COPY_PASTE_MAX_OVERLAP if solo.DATA.COPY_PASTE else None
            ),
            "append_weak_view": solo.DATA.APPEND_WEAK_VIEW,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def reset_schedule(self) -> None:
        """Begin the warm-up anew: for weights that another run has trained."""
        self._iter.zero_()

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: dicts with ``image`` (3, H, W) and, optionally, the ``height`` and
                ``width`` of the image file. In training ``instances`` with gt_boxes, gt_masks
                (BitMasks) and, for the semantic loss, gt_embeddings (N, EMB_DIM); and, for the
                strong view, ``strong_image`` of the shape of ``image``.

        Returns:
            in training the losses of :func:`unseg.modeling.solo.criterion.freesolo_losses`, else
            per image a dict with ``instances`` at the size of the file, with the fields of
            :func:`unseg.modeling.solo.postprocess.to_instances`.
        """
        if self.training:
            return self._train_step(batched_inputs)
        return self._infer(batched_inputs)

    def _train_step(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        images, instances, bottoms = self._training_views(batched_inputs)
        raw = ImageList.from_tensors(images, self.divisibility)
        features = self._features(raw)
        _, predictions = self._predict(features, raw.tensor.shape[-2:])
        self._iter += 1
        with torch.autocast(self.device.type, enabled=False):
            targets = self._targets(raw, instances, bottoms, predictions.features.shape[-2:])
            warmup = self.losses.pairwise_warmup_iters
            factor = (self._iter[0] / warmup).clamp(max=1.0) if warmup else 1.0
            losses = freesolo_losses(
                predictions, targets, len(self.grid.num_grids), self.losses, factor
            )
            return losses | self._more_losses(features, predictions, targets)

    def _more_losses(
        self, features: dict[str, Tensor], predictions: Predictions, targets: Targets
    ) -> dict[str, Tensor]:
        """Losses of models that build on this one; `features` are the backbone's outputs."""
        del features, predictions, targets
        return {}

    def _training_views(
        self, batched_inputs: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Instances], list[int]]:
        """Images and objects of a step (strong views, pasted into, then the weak ones), and the
        rows at the bottom of each that pairwise terms leave out."""
        weak = [x["image"].to(self.device, torch.float32) for x in batched_inputs]
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        bottoms = [
            self.losses.bottom_pixels_removed * x["image"].shape[1] // self._height(x)
            for x in batched_inputs
        ]
        strong = [
            x["strong_image"].to(self.device, torch.float32) if "strong_image" in x else image
            for x, image in zip(batched_inputs, weak, strict=True)
        ]
        views, objects = strong, instances
        if self.copy_paste_overlap is not None:
            views, objects = copy_paste(
                strong,
                instances,
                weak[::-1],
                instances[::-1],
                max_overlap=self.copy_paste_overlap,
                compat=self.inference.compat,
            )
        if self.append_weak_view:
            return views + weak, objects + instances, bottoms * 2
        return views, objects, bottoms

    @staticmethod
    def _height(x: dict[str, Any]) -> int:
        return x.get("height", x["image"].shape[1])

    def _features(self, images: ImageList) -> dict[str, Tensor]:
        """The backbone's outputs of a padded batch of raw images."""
        normalized = (images.tensor - self.pixel_mean) / self.pixel_std
        return self.backbone(normalized * self._inside(images)[:, None])

    def _predict(
        self, features: dict[str, Tensor], image_size: tuple[int, int]
    ) -> tuple[list[Tensor], Predictions]:
        """The category logits (B, classes, S, S) of each level, and everything for all levels."""
        categories, kernels, embeddings = self.ins_head(features, image_size)
        return categories, Predictions(
            flatten_levels(categories),
            flatten_levels(kernels),
            flatten_levels(embeddings),
            self.mask_head(features).float(),
        )

    def _inside(self, images: ImageList, bottoms: Sequence[int] | None = None) -> Tensor:
        """(B, H, W) bool: True on pixels of the images, False on padding and bottom rows."""
        inside = torch.zeros(
            (len(images), *images.tensor.shape[-2:]), dtype=torch.bool, device=self.device
        )
        for index, (height, width) in enumerate(images.image_sizes):
            cut = bottoms[index] if bottoms else 0
            inside[index, : max(0, height - cut), :width] = True
        return inside

    def _targets(
        self,
        images: ImageList,
        instances: Sequence[Instances],
        bottoms: Sequence[int],
        mask_size: tuple[int, int],
    ) -> Targets:
        stride = self.mask_head.stride
        assigned, masks, embeddings, centers = [], [], [], []
        for objects in instances:
            bits = objects.gt_masks.tensor
            centers.append(mask_centers(bits))
            assigned.append(
                assign_cells(
                    objects.gt_boxes.tensor,
                    centers[-1],
                    bits.flatten(1).any(dim=1),
                    images.tensor.shape[-2:],
                    self.grid,
                )
            )
            masks.append(downsample_masks(bits, stride, mask_size))
            embeddings.append(self._embeddings(objects))
        colors = images.tensor if self.input_format == "RGB" else images.tensor.flip(1)
        valid = self._inside(images, bottoms)[:, stride // 2 :: stride, stride // 2 :: stride]
        return Targets(
            counts=[len(objects) for objects in instances],
            pairs=make_pairs(assigned),
            centers=torch.cat(centers),
            masks=torch.cat(masks),
            embeddings=torch.cat(embeddings),
            lab=downsample_colors(colors, stride),
            valid=valid,
        )

    def _embeddings(self, objects: Instances) -> Tensor:
        if objects.has("gt_embeddings"):
            return objects.gt_embeddings.float()
        return torch.zeros((len(objects), self.ins_head.emb_pred.out_channels), device=self.device)

    @torch.no_grad()
    def _infer(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        images = ImageList.from_tensors(
            [x["image"].to(self.device, torch.float32) for x in batched_inputs], self.divisibility
        )
        categories, predictions = self._predict(self._features(images), images.tensor.shape[-2:])
        with torch.autocast(self.device.type, enabled=False):
            return self._detect(batched_inputs, images, categories, predictions)

    def _detect(
        self,
        batched_inputs: list[dict[str, Any]],
        images: ImageList,
        categories: list[Tensor],
        predictions: Predictions,
    ) -> list[dict[str, Instances]]:
        scores = flatten_levels([point_nms(x.float().sigmoid()) for x in categories])
        strides = torch.cat(
            [
                torch.full((grid * grid,), stride, device=self.device)
                for grid, stride in zip(self.grid.num_grids, self.ins_head.strides, strict=True)
            ]
        )
        results = []
        for index, x in enumerate(batched_inputs):
            found = find_candidates(
                scores[index],
                predictions.kernels[index],
                predictions.embeddings[index],
                strides,
                predictions.features[index],
                self.inference,
            )
            output_size = (self._height(x), x.get("width", x["image"].shape[2]))
            instances = to_instances(
                suppress(found, self.inference),
                images.image_sizes[index],
                output_size,
                self.mask_head.stride,
                self.inference,
            )
            results.append({"instances": instances})
        return results
