"""What the embedding head sees, by features and by pixels, and what it makes of it."""

import math
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import ImageList
from embedding_cases import zoo_config
from region_cases import covered_slowly
from torch import nn
from torchvision.ops import roi_align

from unseg.modeling.roi_heads.embedding_head import (
    HierarchicalEmbeddingHead,
    build_roi_embedding_head,
)
from unseg.modeling.roi_heads.region_encoders import CropEncoder, FeatureEncoder, whole_window
from unseg.modeling.roi_heads.regions import Regions

VIEWS = ("fg", "full", "bg")
BOXES = torch.tensor([[10.0, 20, 42, 30], [3, 5, 60, 55], [40, 0, 50, 70]])
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 57.0, 60.0)


def feature_regions(channels=3, dtype=torch.float32):
    """Three regions of two images; one map of stride 4."""
    generator = torch.Generator().manual_seed(0)
    return Regions(
        features={"map": torch.randn(2, channels, 20, 24, generator=generator).to(dtype)},
        boxes=[BOXES[:2], BOXES[2:]],
        masks=list(torch.rand(3, 28, 28, generator=generator).split([2, 1])),
        image_sizes=[(80, 96), (80, 90)],
    )


def feature_encoder(channels=3, **options):
    torch.manual_seed(0)
    pooler = ROIPooler(output_size=7, scales=(0.25,), sampling_ratio=2, pooler_type="ROIAlignV2")
    return FeatureEncoder(in_features=["map"], pooler=pooler, in_channels=channels, **options)


def make_head(encoder=None, **options):
    encoder = encoder or feature_encoder(num_conv=1, conv_dim=8)
    torch.manual_seed(1)
    return HierarchicalEmbeddingHead(encoder=encoder, **({"embed_dim": 4, "fc_dim": 9} | options))


@pytest.mark.parametrize("pool", ["mean", "masked_mean"])
@pytest.mark.parametrize("box_mode", ["square", "tight"])
def test_views_of_features(box_mode, pool):
    """F * M of each view, one region after the other."""
    regions = feature_regions()
    encoder = feature_encoder(num_conv=0, pool=pool, box_mode=box_mode)
    found = encoder(regions, VIEWS)
    assert found.shape == (9, 3)
    masks = torch.cat(list(regions.masks))
    for n, box in enumerate(BOXES.double()):
        x0, y0, x1, y1 = box.tolist()
        if box_mode == "square":
            half, x, y = max(x1 - x0, y1 - y0) / 2, (x0 + x1) / 2, (y0 + y1) / 2
            x0, y0, x1, y1 = x - half, y - half, x + half, y + half
        roi = torch.tensor([[float(n == 2), x0, y0, x1, y1]])
        pooled = roi_align(regions.features["map"], roi, (7, 7), 0.25, 2, aligned=True)[0].double()
        mask = covered_slowly(masks[n].double().numpy(), box.tolist(), (x0, y0, x1, y1), 7)
        for v, weight in enumerate((mask, np.ones_like(mask), 1 - mask)):
            weight = torch.tensor(weight)
            shown = pooled * weight
            if pool == "masked_mean":
                expected = (shown * weight).sum(dim=(1, 2)) / weight.sum()
            else:
                expected = shown.mean(dim=(1, 2))
            torch.testing.assert_close(
                found[v * 3 + n].double(), expected, atol=1e-4, rtol=1e-4, msg=f"{n} {VIEWS[v]}"
            )


def test_a_mask_half_a_cell_off_is_seen():
    """That is, what the test above allows is far less."""
    regions = feature_regions()
    left = torch.zeros(28, 28)
    left[:, :14] = 1
    found = []
    for mask in (left, torch.roll(left, 2, dims=1)):  # of 28 cells; one of 7 has 4
        masks = [mask.expand(len(boxes), -1, -1) for boxes in regions.boxes]
        moved = Regions(regions.features, regions.boxes, masks, regions.image_sizes)
        found.append(feature_encoder(num_conv=0, box_mode="tight")(moved, ("fg",)))
    assert ((found[0] - found[1]).abs().amax(dim=1) > 5e-3).all()


def numpy_crop(image, mask, box, size, box_mode):
    """Spec 1.2 with loops: the window of whole pixels, black outside, masked; at a whole multiple
    of the crop's size the antialiased resize keeps constant what is constant."""
    x0, y0, x1, y1 = whole_window(box, box_mode)
    views = []
    for shown in (mask, np.ones_like(mask), 1 - mask):
        crop = np.zeros((3, y1 - y0, x1 - x0))
        for y in range(y0, y1):
            for x in range(x0, x1):
                if 0 <= y < image.shape[1] and 0 <= x < image.shape[2]:
                    crop[:, y - y0, x - x0] = image[:, y, x] * shown[y, x]
        views.append(crop)
    return np.stack(views)


def crop_regions(boxes, masks=None, whole_images=False):
    """Regions of one image, 80 x 90 of 96 x 96 padded pixels."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(1, 256, (3, 80, 90), generator=generator).float()
    normal = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    batch = ImageList.from_tensors([normal], 32)
    if masks is None:
        masks = torch.rand(len(boxes), 28, 28, generator=generator)
    return image, Regions({}, [boxes], [masks], [(80, 90)], whole_images, batch)


def crop_encoder(**options):
    torch.manual_seed(3)
    return CropEncoder(pixel_mean=MEAN, pixel_std=STD, **({"crop_size": 32} | options))


@pytest.mark.parametrize("box_mode", ["square", "tight"])
def test_views_of_pixels(box_mode):
    """Windows of 32 pixels are not resized: pixel by pixel as the paper's code cuts them."""
    boxes = torch.tensor([[10.0, 20, 42, 52], [70, 60, 102, 92], [-5, -9, 27, 23]])
    masks = torch.zeros(3, 80, 90, dtype=torch.bool)
    masks[0, 25:40, 15:30] = masks[1, 70:, 75:] = masks[2, :10, 4:20] = True
    image, regions = crop_regions(boxes, masks, whole_images=True)
    found = list(crop_encoder(box_mode=box_mode).cut(regions, 0, VIEWS))
    assert len(found) == 3
    for (crop, cells), mask, box in zip(found, masks, boxes.tolist(), strict=True):
        expected = numpy_crop(image.numpy(), mask.numpy().astype(float), box, 32, box_mode)
        np.testing.assert_allclose(crop.numpy(), expected, atol=1e-3)
        x0, y0, x1, y1 = whole_window(box, box_mode)
        full = np.zeros((32, 32))
        inside = mask[max(y0, 0) : y1, max(x0, 0) : x1].numpy()
        top, left = max(-y0, 0), max(-x0, 0)
        full[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        assert cells.shape == (1, 1)  # 32 pixels are one of the network's last cells
        assert abs(float(cells) - full.mean()) < 1e-5


def test_pixels_are_masked_before_they_are_resized():
    """Half the resolution: a triangle filter over masked pixels, not a masked crop."""
    boxes = torch.tensor([[10.0, 8, 74, 72]])
    masks = torch.rand(1, 80, 90) > 0.5
    image, regions = crop_regions(boxes, masks, whole_images=True)
    ((crop, _),) = crop_encoder().cut(regions, 0, ("fg",))
    masked = (image * masks[0]).double().numpy()[:, 8:72, 10:74]
    # Weights of the antialiased filter of two pixels: 1, 3, 3, 1 over the four nearest, at the
    # border without those outside.
    weights = np.zeros((32, 64))
    for i in range(32):
        for k, w in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= k < 64:
                weights[i, k] = w
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("ih,chw,jw->cij", weights, masked, weights)
    np.testing.assert_allclose(crop[0].numpy(), expected, atol=2e-3)


def test_masks_of_boxes_are_pasted():
    """A box's mask of ones covers the box, and nothing else."""
    boxes = torch.tensor([[20.0, 30, 52, 46]])
    image, regions = crop_regions(boxes, torch.ones(1, 28, 28))
    ((crops, _),) = crop_encoder().cut(regions, 0, ("fg", "full", "bg"))
    fg, full, bg = crops
    top, left = 38 - 16, 20
    torch.testing.assert_close(full, image[:, top : top + 32, left : left + 32], atol=1e-3, rtol=0)
    torch.testing.assert_close(fg + bg, full)
    assert torch.equal(fg[:, 8:24] != 0, full[:, 8:24] != 0)
    assert (fg[:, :8] == 0).all()
    assert (fg[:, 24:] == 0).all()


def test_whole_windows():
    assert whole_window((10.2, 20.4, 42.4, 30.0), "square") == (10, 9, 42, 41)
    assert whole_window((10.2, 20.6, 42.4, 30.5), "tight") == (10, 21, 42, 31)
    assert whole_window((5.1, 5.1, 5.2, 5.3), "square") == (5, 5, 6, 6)
    assert whole_window((5.1, 5.1, 5.2, 5.3), "tight") == (5, 5, 6, 6)


@pytest.mark.parametrize("normalize", [False, True])
def test_what_the_crop_network_is_given(normalize):
    boxes = torch.tensor([[10.0, 20, 42, 52], [0, 0, 70, 40]])
    image, regions = crop_regions(boxes)
    encoder = crop_encoder(normalize=normalize)
    seen = []
    encoder.stages.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = encoder(regions, ("fg", "full"))
    assert found.shape == (4, 512)
    crops = torch.stack([c for c, _ in encoder.cut(regions, 0, ("fg", "full"))], dim=1)
    crops = crops.flatten(0, 1)  # view by view
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    expected = (crops - mean) / std if normalize else crops / 255
    torch.testing.assert_close(torch.cat(seen), expected)
    assert not found.requires_grad
    torch.testing.assert_close(found, encoder.stages(expected).mean(dim=(2, 3)))


def test_crop_network_that_is_trained(monkeypatch):
    _, regions = crop_regions(torch.tensor([[10.0, 20, 42, 52]]))
    encoder = crop_encoder(frozen=False)
    encoder(regions, VIEWS).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)
    encoder(crop_regions(torch.zeros(0, 4))[1], VIEWS).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())
    # In parts where no gradient is kept.
    whole = encoder(regions, VIEWS).detach()
    monkeypatch.setattr("unseg.modeling.roi_heads.region_encoders._CROPS_AT_ONCE", 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder(regions, VIEWS), whole)


def test_crops_without_images():
    regions = Regions({}, [torch.zeros(0, 4)], [torch.zeros(0, 28, 28)], [(80, 90)])
    with pytest.raises(RuntimeError, match="showing"):
        crop_encoder()(regions, ("fg",))


def test_weights_of_a_resnet():
    """The same numbers as from the network that they are of."""
    torch.manual_seed(0)
    stages = ResNet.make_default_stages(50, norm="FrozenBN", stride_in_1x1=False)
    resnet = ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res5"]).eval()
    encoder = crop_encoder(depth=50)
    encoder.load_resnet(resnet.state_dict() | {"stem.fc.weight": torch.zeros(1), "other": 0})
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder.stages(x), resnet(x)["res5"])
    broken = resnet.state_dict()
    del broken["res4.0.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"3\.0\.conv1\.weight"):
        encoder.load_resnet(broken)


def test_pickles_of_backbones_are_not_taken_for_the_head(tmp_path):
    """Detectron2 matches names by their ends where a file asks for it."""
    stages = [
        ResNet.make_stage(
            BottleneckBlock, 1, in_channels=4, out_channels=4, bottleneck_channels=4, norm="BN"
        )
    ]
    backbone = ResNet(BasicStem(3, 4, norm="BN"), stages, num_classes=7)
    weights = {k: torch.randn_like(v.float()).numpy() for k, v in backbone.state_dict().items()}
    weights |= {"fc1000.weight": np.zeros((7, 4), np.float32), "fc1.weight": np.ones(1)}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(
        pickle.dumps({"model": weights, "__author__": "test", "matching_heuristics": True})
    )
    model = nn.Module()
    model.backbone, model.embedding_head = backbone, make_head(crop_encoder())
    before = {k: v.clone() for k, v in model.embedding_head.state_dict().items()}
    DetectionCheckpointer(model).load(str(path))
    assert torch.equal(backbone.stem.conv1.weight, torch.tensor(weights["stem.conv1.weight"]))
    for key, value in model.embedding_head.state_dict().items():
        # Detectron2 sets absent variances of its frozen norms to 1, after 1 - 1e-5.
        torch.testing.assert_close(value, before[key], atol=2e-5, rtol=0, msg=key)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_tangents_and_points(c):
    """By views, cut in the ball; points are expmap0 of them in float64."""
    head = make_head(c=c, init_std=5.0, max_tangent_norm=1.5)
    regions = feature_regions()
    found = head(regions, VIEWS)
    assert list(found) == list(VIEWS)
    for view, u in found.items():
        assert u.shape == (3, 4)
        assert u.dtype == torch.float32
        torch.testing.assert_close(u, head(regions, (view,))[view])
        norms = math.sqrt(c) * torch.linalg.vector_norm(u.double(), dim=1)
        assert (norms <= 1.5 + 1e-5).all()
        x = head.to_points(u)
        assert x.dtype == torch.float64
        expected = torch.tanh(norms)[:, None] * u.double() / norms[:, None]
        torch.testing.assert_close(x, expected, atol=1e-12, rtol=1e-9)
    assert (
        max(float(u.detach().norm(dim=1).max()) for u in found.values()) * math.sqrt(c) > 1.5 - 1e-4
    )


def test_linear_layers():
    """The layers one by one, from what the encoder gives."""
    head = make_head(num_fc=2)
    regions = feature_regions()
    x = head.encoder(regions, ("fg",))
    for fc in head.fcs:
        x = torch.relu(x @ fc.weight.T + fc.bias)
    expected = x @ head.to_tangent.weight.T + head.to_tangent.bias
    assert len(head.fcs) == 2
    torch.testing.assert_close(head(regions)["fg"], expected)


def test_euclidean_embeddings_are_not_cut():
    head = make_head(geometry="euclidean", init_std=50.0)
    u = head(feature_regions())["fg"]
    assert u.norm(dim=1).max() > 2.5
    assert torch.equal(head.to_points(u), u.double())


def test_riemannian_gradients():
    """The gradient at the ball's point times ((1 - c x^2) / 2)^2, taken back through expmap0."""
    c = 0.7
    plain, scaled = (make_head(c=c, riemannian_grad_scale=x, init_std=0.5) for x in (False, True))
    regions = feature_regions()
    target = torch.tensor([0.1, -0.2, 0.3, 0.05], dtype=torch.float64)

    def gradient(head, by_hand=False):
        u = head(regions)["fg"]
        inner = u.detach().clone().requires_grad_()
        x = head.to_points(inner)
        (gx,) = torch.autograd.grad(((x - target) ** 2).sum(), x, retain_graph=True)
        if by_hand:
            gx = gx * ((1 - c * (x.detach() ** 2).sum(dim=1, keepdim=True)) / 2) ** 2
        (gu,) = torch.autograd.grad(x, inner, gx)
        return torch.autograd.grad(u, head.to_tangent.weight, gu)[0]

    torch.testing.assert_close(
        gradient(scaled), gradient(plain, by_hand=True), rtol=1e-4, atol=1e-7
    )
    assert not torch.allclose(gradient(scaled), gradient(plain), rtol=0.1)
    torch.testing.assert_close(scaled(regions)["fg"], plain(regions)["fg"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_features(dtype):
    head = make_head()
    expected = head(feature_regions())["fg"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(feature_regions())["fg"]
        rounded = head(feature_regions(dtype=dtype))["fg"]
    assert torch.equal(found, expected)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, atol=2e-2, rtol=2e-2)


def test_no_regions():
    nothing = Regions(
        feature_regions().features,
        [torch.zeros(0, 4)] * 2,
        [torch.zeros(0, 28, 28)] * 2,
        [(80, 96)] * 2,
    )
    head = make_head()
    found = head(nothing, VIEWS)
    assert [tuple(u.shape) for u in found.values()] == [(0, 4)] * 3
    sum(u.sum() for u in found.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_head_of_a_config():
    shapes = {f"p{k}": ShapeSpec(channels=32, stride=2**k) for k in (2, 3, 4, 5)}
    head = build_roi_embedding_head(zoo_config(embedding={"NUM_CONV": 3, "CURVATURE": 0.5}), shapes)
    assert isinstance(head.encoder, FeatureEncoder)
    assert (len(head.encoder.convs), head.embed_dim, head.c) == (3, 6, 0.5)
    assert head.encoder.in_features == ("p2", "p3", "p4", "p5")
    crop = build_roi_embedding_head(
        zoo_config(embedding={"FEATURE_SOURCE": "crop", "CROP_DEPTH": 34, "CROP_FREEZE": False}),
        shapes,
    )
    assert isinstance(crop.encoder, CropEncoder)
    assert crop.encoder.out_channels == 512
    assert all(p.requires_grad for p in crop.parameters())
    for key, value, name in (
        ("FEATURE_SOURCE", "pixels", "FEATURE_SOURCE"),
        ("BOX_MODE", "round", "BOX_MODE"),
        ("POOL", "max", "POOL"),
        ("GEOMETRY", "sphere", "GEOMETRY"),
        ("CURVATURE", -1.0, "CURVATURE"),
        ("MAX_TANGENT_NORM", 0.0, "MAX_TANGENT_NORM"),
        ("EMBED_DIM", 0, "EMBED_DIM"),
        ("IN_FEATURES", ["p9"], "IN_FEATURES"),
    ):
        with pytest.raises(ValueError, match=name):
            build_roi_embedding_head(zoo_config(embedding={key: value}), shapes)
    wide = shapes | {"p5": ShapeSpec(channels=64, stride=32)}
    with pytest.raises(ValueError, match="IN_FEATURES"):
        build_roi_embedding_head(zoo_config(), wide)
    for key, value in (("CROP_DEPTH", 20), ("CROP_SIZE", 100), ("CROP_SIZE", 0)):
        with pytest.raises(ValueError, match=key):
            build_roi_embedding_head(
                zoo_config(embedding={"FEATURE_SOURCE": "crop", key: value}), shapes
            )
