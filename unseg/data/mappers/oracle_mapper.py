"""A mapper that tells a model at test time what it should find, for the oracle number of clusters.

The published protocol of spectral segmentation on videos clusters every frame into as many objects
as its annotations have (see VideoMIoUEvaluator). Numbers taken so are not those of a model.
"""

from typing import Any

import torch

from unseg.data.instance_map import instance_index_map
from unseg.data.mappers.instance_mapper import InstanceMapper
from unseg.data.mappers.registry import MAPPERS


@MAPPERS.register()
class OracleMapper(InstanceMapper):
    """:class:`InstanceMapper` that adds the annotated objects at test time. Training is the same.

    Legend: H W the size of the image file, whatever the size of the image that the model gets.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            dataset_dict: as InstanceMapper takes it, with ``annotations`` at test time, too.

        Returns:
            what InstanceMapper returns and, at test time, ``instance_map`` (H, W) int32 on the CPU
            (see :func:`unseg.data.instance_map.instance_index_map`).

        Raises:
            ValueError: there are no annotations, or one of them has no valid mask.
        """
        mapped = super().__call__(dataset_dict)
        if self.is_train:
            return mapped
        if "annotations" not in dataset_dict:
            raise ValueError(
                f"{dataset_dict['file_name']}: OracleMapper needs 'annotations' at test time"
            )
        try:
            index_map = instance_index_map(
                dataset_dict["annotations"], mapped["height"], mapped["width"]
            )
        except ValueError as error:
            raise ValueError(f"{dataset_dict['file_name']}: {error}") from error
        mapped["instance_map"] = torch.from_numpy(index_map)
        return mapped
