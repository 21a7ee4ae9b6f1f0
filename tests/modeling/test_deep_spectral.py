"""DeepSpectral: spectral segmentation behind Detectron2's model interface."""

import logging

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from torch import nn

from unseg.config import load_config
from unseg.discovery.spectral import SpectralSettings, segment
from unseg.discovery.spectral.settings import ClusterSettings
from unseg.modeling import DeepSpectral
from unseg.structures import sample_on_grid

CONFIG = "projects/DeepSpectral/configs/deep_spectral_tiny.yaml"
PATCH = 4
CHANNELS = 96


class Patches(Backbone):
    """Waves of the mean colour of each whole patch; what is left over is cropped, as a ViT does."""

    patch_size = PATCH

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("direction", 2 * torch.randn(CHANNELS, 3, generator=rng))
        self.register_buffer("phase", 6 * torch.rand(CHANNELS, generator=rng))
        self.sizes = []

    def output_shape(self):
        return {"key": ShapeSpec(channels=CHANNELS, stride=PATCH)}

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        colour = nn.functional.avg_pool2d(x, PATCH).permute(0, 2, 3, 1)
        return {"key": torch.cos(colour @ self.direction.t() + self.phase).permute(0, 3, 1, 2)}


def make(**options):
    settings = SpectralSettings(
        clusters=ClusterSettings(mode=options.pop("mode", "auto")),
        embedding_median=options.pop("embedding_median", 3),
    )
    return DeepSpectral(
        backbone=Patches(),
        in_feature="key",
        pixel_mean=[128.0] * 3,
        pixel_std=[64.0] * 3,
        settings=settings,
        **options,
    ).eval()


def picture(height=80, width=120, seed=0):
    """A red and a blue rectangle on grey, with some noise; their map."""
    rng = np.random.default_rng(seed)
    instances = np.zeros((height, width), dtype=np.int32)
    instances[16:52, 16:44] = 1
    instances[20:60, 68:100] = 2
    colours = np.array([[90, 90, 90], [220, 90, 40], [180, 30, 160]])
    image = colours[instances] + rng.normal(0, 6, (height, width, 3))
    image = torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    return {"image": image}, instances


def iou(masks, truth):
    return [
        max((np.sum(m & (truth == k)) / np.sum(m | (truth == k)) for m in masks), default=0)
        for k in range(1, truth.max() + 1)
    ]


def test_instances():
    inputs, truth = picture()
    (output,) = make()([inputs])
    instances = output["instances"]
    assert instances.image_size == (80, 120)
    masks = instances.pred_masks
    assert masks.shape == (2, 80, 120)
    assert masks.dtype == torch.bool
    assert min(iou(masks.numpy(), truth)) > 0.8
    assert instances.pred_classes.tolist() == [0, 0]
    assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
    assert instances.pred_embeddings.shape == (2, 128)
    for mask, box in zip(masks.numpy(), instances.pred_boxes.tensor.tolist()):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    labels = output["grid_labels"]
    assert labels.labels.shape == (20, 30)
    assert labels.extent == (1, 1)
    assert min(iou([labels.labels.numpy() == k for k in (1, 2)], truth[2::4, 2::4])) > 0.8
    assert "segments" not in output


def test_incomplete_patches_have_no_masks():
    inputs, truth = picture(83, 121)
    inputs["image"][:, :, -1] = 255  # never seen
    model = make()
    (output,) = model([inputs])
    expected = model([picture(80, 120)[0]])[0]["instances"]
    assert output["grid_labels"].extent == (80 / 83, 120 / 121)
    assert output["instances"].pred_masks.shape[1:] == (83, 121)
    assert not output["instances"].pred_masks[:, 80:].any()
    assert not output["instances"].pred_masks[:, :, 120:].any()
    assert min(iou(output["instances"].pred_masks.numpy(), truth)) > 0.8
    assert len(expected) == 2


def test_size_of_the_file():
    inputs, truth = picture(83, 121)
    size = {"height": 2 * 83, "width": 3 * 121}
    (small,) = make()([inputs])
    (large,) = make()([inputs | size])
    masks = large["instances"].pred_masks
    assert masks.shape[1:] == (166, 363)
    assert not masks[:, 160:].any()
    assert not masks[:, :, 360:].any()
    assert min(iou(masks.numpy(), truth.repeat(2, axis=0).repeat(3, axis=1))) > 0.8
    assert large["grid_labels"].extent == small["grid_labels"].extent
    assert torch.equal(large["grid_labels"].labels, small["grid_labels"].labels)


def test_batches_give_what_single_images_give():
    inputs = [
        picture(*size, seed)[0] for seed, size in enumerate([(80, 120), (84, 116), (80, 120)])
    ]
    model = make()
    together = model(inputs)
    assert sorted(model.backbone.sizes) == [(1, 3, 84, 116), (2, 3, 80, 120)]
    found = model.discover(inputs)
    for output, masks, x in zip(together, found, inputs, strict=True):
        (alone,) = model([x])
        assert torch.equal(output["instances"].pred_masks, alone["instances"].pred_masks)
        assert np.array_equal([m.decode() for m in masks], output["instances"].pred_masks.numpy())
        assert [m.score for m in masks] == output["instances"].scores.tolist()


def test_oracle_by_number():
    inputs, _ = picture()
    model = make(mode="oracle", output_intermediates=True)
    for count in (1, 2, 3):
        (output,) = model([inputs | {"num_instances": count}])
        points = output["segments"].embedding[:, output["segments"].foreground].t().numpy()
        assert len(np.unique(points, axis=0)) > 3
        settings = SpectralSettings(clusters=ClusterSettings(mode="fixed", num=count))
        expected = segment(
            model.backbone((inputs["image"][None].float() - 128) / 64)["key"][0],
            SpectralSettings(clusters=settings.clusters, embedding_median=3),
        )
        assert torch.equal(output["grid_labels"].labels, expected.labels)
    (output,) = model([inputs | {"num_instances": 0}])
    assert len(output["instances"]) == 0
    assert model.dropped == {"images: no instance to look for": 1}


@pytest.mark.parametrize("sampling", ["center", "corner", "majority"])
def test_oracle_by_map(sampling):
    inputs, truth = picture(83, 121)
    # Instances on a patch's corner, its centre, half of it, and outside the grid.
    truth[0, 0], truth[6, 2], truth[4:8, 8:11], truth[82, 120] = 3, 4, 5, 6
    expected = set(sample_on_grid(truth, (20, 30), (80 / 83, 120 / 121), sampling).ravel()) - {0}
    assert expected == {1, 2, 5} | {"corner": {3}, "center": {4}, "majority": set()}[sampling]
    by_map = make(mode="oracle", oracle_sampling=sampling)
    (found,) = by_map([inputs | {"instance_map": truth}])
    (known,) = by_map([inputs | {"num_instances": len(expected)}])
    assert torch.equal(found["grid_labels"].labels, known["grid_labels"].labels)
    # The number comes first, and a map at the size of the file will do.
    (both,) = by_map([inputs | {"instance_map": 0 * truth, "num_instances": len(expected)}])
    assert torch.equal(both["grid_labels"].labels, known["grid_labels"].labels)
    large = {"instance_map": truth.repeat(2, axis=0).repeat(2, axis=1)}
    (twice,) = make(mode="oracle")([inputs | {"height": 166, "width": 242} | large])
    assert len(twice["instances"]) > 0


def test_oracle_needs_something():
    with pytest.raises(ValueError, match="OracleMapper"):
        make(mode="oracle")([picture()[0]])
    with pytest.raises(ValueError, match="ORACLE_SAMPLING must be one of .* 'middle'"):
        make(oracle_sampling="middle")


def test_images_without_instances(caplog):
    one_colour = {"image": torch.full((3, 40, 56), 90, dtype=torch.uint8), "file_name": "plain.jpg"}
    stripes = torch.zeros(3, 40, 56, dtype=torch.uint8)
    stripes[:, 2::4] = 250  # all patches look alike
    model = make(output_intermediates=True)
    with caplog.at_level(logging.INFO, logger="unseg"):
        plain, alike, good = model([one_colour, {"image": stripes}, picture()[0]])
    for output in (plain, alike):
        assert len(output["instances"]) == 0
        assert output["instances"].pred_masks.shape == (0, 40, 56)
        assert not output["grid_labels"].labels.any()
        assert output["grid_labels"].labels.shape == (10, 14)
    assert len(good["instances"]) == 2
    assert "segments" not in plain
    assert alike["segments"].reason == "all patches look alike"
    assert model.dropped == {"images: one colour": 1, "images: all patches look alike": 1}
    assert "plain.jpg: no instances: one colour" in caplog.text
    assert "no instances: all patches look alike" in caplog.text
    assert model.discover([one_colour, {"image": stripes}]) == [[], []]


def test_intermediates():
    inputs, _ = picture()
    (output,) = make(output_intermediates=True)([inputs])
    segments = output["segments"]
    assert segments.fiedler.shape == segments.foreground.shape == (20, 30)
    assert segments.embedding.shape == (4, 20, 30)
    assert len(segments.channels) == 15  # 60 / 128 of a third
    assert torch.equal(segments.labels, output["grid_labels"].labels)


def test_large_images_are_made_smaller():
    inputs, _ = picture()
    model = make(max_patches=300)
    (output,) = model([inputs])
    height, width = model.backbone.sizes[0][-2:]
    assert (height // PATCH) * (width // PATCH) <= 300 < 600
    assert height / width == pytest.approx(80 / 120, abs=0.03)
    assert output["instances"].pred_masks.shape[1:] == (80, 120)
    # As if the image had been loaded at that size.
    small = nn.functional.interpolate(
        inputs["image"][None].float(), (height, width), mode="bilinear", antialias=True
    )[0]
    (expected,) = make()([{"image": small, "height": 80, "width": 120}])
    assert torch.equal(output["instances"].pred_masks, expected["instances"].pred_masks)
    grid, extent = output["grid_labels"].labels.shape, output["grid_labels"].extent
    assert extent == pytest.approx((grid[0] * PATCH / height, grid[1] * PATCH / width))


def test_nothing_to_train():
    with pytest.raises(RuntimeError, match="nothing to train"):
        make().train()([picture()[0]])


@pytest.mark.parametrize("size", [(1, 1), (9, 200), (64, 64)])
def test_built_from_yaml_on_images_of_any_size(size):
    model = build_model(load_config(CONFIG)).eval()
    (output,) = model([{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}])
    assert output["instances"].pred_masks.shape[1:] == size


def test_yaml_reaches_the_model():
    overrides = {
        "MODEL.DEEP_SPECTRAL.AFFINITY": "cosine",
        "MODEL.DEEP_SPECTRAL.CLUSTERS.ORACLE_SAMPLING": "corner",
        "MODEL.DEEP_SPECTRAL.OUTPUT_INTERMEDIATES": True,
        "DISCOVERY.MAX_PATCHES": 1234,
    }
    cfg = load_config(CONFIG, [x for pair in overrides.items() for x in pair])
    model = build_model(cfg)
    assert isinstance(model, DeepSpectral)
    assert model.settings == SpectralSettings.from_node(cfg.MODEL.DEEP_SPECTRAL)
    assert model.settings.affinity == "cosine"
    assert (model.oracle_sampling, model.output_intermediates) == ("corner", True)
    assert model.max_patches == 1234
