"""Discovery behind Detectron2's model interface."""

from collections import Counter

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from torch import nn

from unseg.config import load_config
from unseg.modeling import MaskDiscovery
from unseg.structures import PseudoMask, encode_masks

CONFIG = "projects/FreeSOLO/configs/free_masks_tiny.yaml"


class Identity(Backbone):
    """Returns what it is given, and remembers the batch shapes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def output_shape(self):
        return {"same": ShapeSpec(channels=3, stride=1)}

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return {"same": x}


def bright(features, image_size, *, dropped):
    """One mask: where the first channel of the features is positive, scaled to the image."""
    dropped["dim"] += 1
    grid = nn.functional.interpolate(features[None, :1], size=image_size)[0] > 0
    return [PseudoMask(encode_masks(grid)[0], float(features.mean()), features[:, 0, 0].numpy())]


def make():
    return MaskDiscovery(
        backbone=Identity(),
        discoverer=bright,
        in_feature="same",
        pixel_mean=[10.0, 20.0, 30.0],
        pixel_std=[1.0, 2.0, 4.0],
    ).eval()


def test_images_are_normalised_grouped_by_size_and_never_padded():
    model = make()
    images = [torch.rand(3, h, w) * 50 for h, w in ((4, 6), (6, 4), (4, 6), (4, 6))]
    inputs = [{"image": image} for image in images]
    outputs = model(inputs)
    assert sorted(model.backbone.shapes) == [(1, 3, 6, 4), (3, 3, 4, 6)]
    for image, output in zip(images, outputs, strict=True):
        expected = (image - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor(
            [1.0, 2, 4]
        ).view(3, 1, 1)
        instances = output["instances"]
        assert torch.equal(instances.pred_masks[0], expected[0] > 0)
        torch.testing.assert_close(instances.scores[0], expected.mean())
        torch.testing.assert_close(instances.pred_embeddings[0], expected[:, 0, 0])
        assert instances.pred_classes.tolist() == [0]
    assert model.dropped == Counter(dim=4)


def test_output_has_the_size_of_the_file():
    image = torch.zeros(3, 4, 6)
    image[0, :2, :3] = 100
    (output,) = make()([{"image": image, "height": 8, "width": 24}])
    instances = output["instances"]
    assert instances.image_size == (8, 24)
    assert instances.pred_masks.shape == (1, 8, 24)
    assert instances.pred_boxes.tensor.tolist() == [[0, 0, 12, 4]]


def test_no_masks():
    model = make()
    model.discoverer = lambda *_, **__: []
    (output,) = model([{"image": torch.zeros(3, 5, 7)}])
    instances = output["instances"]
    assert len(instances) == 0
    assert instances.pred_masks.shape == (0, 5, 7)
    assert instances.pred_boxes.tensor.shape == (0, 4)


def test_misuse():
    with pytest.raises(RuntimeError, match="eval mode"):
        make().train()([{"image": torch.zeros(3, 5, 7)}])
    with pytest.raises(ValueError, match="'same'"):
        MaskDiscovery(
            backbone=Identity(), discoverer=bright, in_feature="res5", pixel_mean=[0], pixel_std=[1]
        )


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64)])
def test_built_from_yaml_on_images_of_any_size(size):
    model = build_model(load_config(CONFIG)).eval()
    (output,) = model([{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}])
    assert output["instances"].pred_masks.shape[1:] == size


def test_constant_image_has_no_masks():
    model = build_model(load_config(CONFIG, ["MODEL.FILTER_BANK.POSITION_WEIGHT", 0.0])).eval()
    (output,) = model([{"image": torch.full((3, 64, 64), 120, dtype=torch.uint8)}])
    assert len(output["instances"]) == 0


# --- patches: what the backbone leaves out, and how many there may be


class Patches(Identity):
    """Means of whole patches of 4 pixels; what is left over is cropped, as a ViT does."""

    patch_size = 4

    def output_shape(self):
        return {"same": ShapeSpec(channels=3, stride=4)}

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return {"same": nn.functional.avg_pool2d(x, 4)}


def with_patches(max_patches=0):
    return MaskDiscovery(
        backbone=Patches(),
        discoverer=bright,
        in_feature="same",
        pixel_mean=[50.0] * 3,
        pixel_std=[1.0] * 3,
        max_patches=max_patches,
    ).eval()


@pytest.mark.parametrize(
    ("size", "file", "covered"),
    [
        ((8, 12), (8, 12), (8, 12)),
        ((11, 13), (11, 13), (8, 12)),
        ((11, 13), (22, 39), (16, 36)),
        ((10, 10), (5, 7), (4, 6)),  # 0.8 of 5 and of 7, which is 5.6
    ],
)
def test_masks_end_where_the_patches_end(size, file, covered):
    image = torch.full((3, *size), 100.0)
    image[:, 0, 0] = 90  # not of one colour
    (output,) = with_patches()([{"image": image, "height": file[0], "width": file[1]}])
    (mask,) = output["instances"].pred_masks
    assert mask.shape == file
    expected = torch.zeros(file, dtype=torch.bool)
    expected[: covered[0], : covered[1]] = True
    assert torch.equal(mask, expected)
    assert output["instances"].pred_boxes.tensor.tolist() == [[0, 0, covered[1], covered[0]]]


def test_backbones_without_patches_cover_all_of_the_image():
    # A convolution's output of 3 x 4 cells is taken to cover 11 x 13 pixels.
    model = with_patches()
    model.backbone.patch_size = None
    image = torch.full((3, 11, 13), 100.0)
    image[:, 0, 0] = 90
    (output,) = model([{"image": image}])
    assert output["instances"].pred_masks.all()


@pytest.mark.parametrize("size", [(40, 60), (4, 400), (60, 44), (17, 39)])
@pytest.mark.parametrize("limit", [1, 7, 20, 150, 0])
def test_more_patches_than_allowed(size, limit):
    image = torch.full((3, *size), 100.0)
    image[:, : size[0] // 2] = 0
    model = with_patches(limit)
    (output,) = model([{"image": image}])
    (_, _, height, width) = model.backbone.shapes[0]
    patches = (size[0] // 4) * (size[1] // 4)
    if limit == 0 or patches <= limit:
        assert (height, width) == size
    else:
        assert (height // 4) * (width // 4) <= limit
        assert min(height, width) >= 4
    assert output["instances"].pred_masks.shape == (1, *size)
    mask = output["instances"].pred_masks[0]
    if limit in (0, 150) and size == (40, 60):
        assert mask[24:36, :52].all()
        assert not mask[:16].any()


def test_one_warning_for_all_large_images(caplog):
    model = with_patches(20)
    image = torch.rand(3, 40, 62) * 255
    model([{"image": image}])
    model([{"image": image}, {"image": image}])
    warnings = [r for r in caplog.records if "MAX_PATCHES" in r.getMessage()]
    assert len(warnings) <= 1  # once in a process: another test may have had it
    if warnings:
        assert "MAX_PATCHES 20" in warnings[0].getMessage()


def test_images_of_one_colour(caplog):
    model = make()
    image = torch.tensor([30.0, 60, 90]).view(3, 1, 1).expand(3, 5, 7)
    almost = image.clone()
    almost[2, 4, 6] += 1
    outputs = model([{"image": image, "file_name": "plain.jpg"}, {"image": almost}])
    assert [len(x["instances"]) for x in outputs] == [0, 1]
    assert outputs[0]["instances"].pred_masks.shape == (0, 5, 7)
    assert model.dropped == Counter({"images: one colour": 1, "dim": 1})
    assert model.backbone.shapes == [(1, 3, 5, 7)]
