"""Exemplar pools, models that embed, and the embedding in float64, for the tests of both."""

import math

import numpy as np
import torch
from detectron2.structures import BoxMode
from freesolo_cases import NARROW, patches, rectangles
from PIL import Image
from torch import nn

from unseg.config import load_config
from unseg.modeling import ExemplarContrast
from unseg.structures import Exemplar, ExemplarPool, encode_masks

FREESOLO = "projects/FreeSOLO/configs/freesolo_tiny.yaml"
EXEMPLAR = "projects/ExemplarFreeSOLO/configs/exemplar_freesolo_tiny.yaml"
SIZES = ((40, 64), (33, 70), (64, 40), (20, 20), (48, 90))


def narrow_config(path=EXEMPLAR, **changes):
    options = NARROW | {k.replace("__", "."): v for k, v in changes.items()}
    return load_config(path, [x for item in options.items() for x in item])


def make_pool(count=5, dim=None, seed=0, sizes=SIZES, categories=2):
    """Patches of several sizes, the lower right part for a mask, and (with `dim`) embeddings."""
    rng = np.random.default_rng(seed)
    exemplars = []
    for n in range(count):
        height, width = sizes[n % len(sizes)]
        y, x = np.mgrid[:height, :width]
        mask = x / width + y / height > 0.7
        image = np.ascontiguousarray(patches(rng, height, width).transpose(1, 2, 0))
        embedding = None if dim is None else rng.normal(size=dim).astype(np.float32)
        if dim is not None:
            embedding /= np.linalg.norm(embedding)
        name = f"class{n * categories // count}"
        box = (0, 0, width, height)
        exemplars.append(Exemplar(image, mask, name, f"{n}.jpg", box, "coarse", embedding))
    return ExemplarPool(tuple(exemplars))


def images_and_masks(pool):
    return [x.image for x in pool.exemplars], [x.mask for x in pool.exemplars]


def shake_norms(model, seed=0):
    """Statistics and weights of batch norms that are not those of a new one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for value, low, high in (
                    (m.running_mean, -0.3, 0.3),
                    (m.running_var, 0.5, 1.5),
                    (m.weight, 0.5, 1.5),
                    (m.bias, -0.3, 0.3),
                ):
                    value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator))
    return model


# The embedding and the loss, from the paper's form: features blown up to the mask's pixels.


def unit(vector):
    length = vector.square().sum().sqrt()
    return vector / length if length > 0 else vector


def embed_slowly(feature, mask):
    """Feature (C, h, w) of a mask (H, W), H and W multiples of h and w."""
    feature, mask = feature.double(), mask.double()
    lengths = feature.norm(dim=0)  # whose gradient at 0 is 0
    cells = feature / torch.where(lengths > 0, lengths, 1.0)
    for axis, (large, small) in enumerate(zip(mask.shape, cells.shape[1:], strict=True), 1):
        assert large % small == 0
        cells = cells.repeat_interleave(large // small, dim=axis)
    return unit((cells * mask).sum(dim=(1, 2)))


def contrast_slowly(embeddings, pool, alpha, beta, temperature):
    """The mean of -log(pos / (pos + neg)) over objects with both, and how many have what."""
    losses, positives, negatives = [], 0, 0
    pool = [unit(x.double()) for x in pool]
    for embedding in embeddings:
        if not embedding.any():
            continue
        cosines = [(embedding * exemplar).sum() for exemplar in pool]
        far = [torch.exp(c / temperature) for c in cosines if c < beta]
        positives += max(cosines) > alpha
        negatives += len(far)
        if max(cosines) > alpha and far:
            pos = torch.exp(max(cosines) / temperature)
            losses.append(-torch.log(pos / (pos + sum(far) / len(far))))
    number = len([x for x in embeddings if x.any()])
    counts = {"objects": number, "positives": int(positives), "used": len(losses)}
    return sum(losses) / max(len(losses), 1), counts | {"negatives": negatives}


# A model of two layers that embeds the left half of what it is shown.


class Backbone(nn.Module):
    size_divisibility = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.frozen = nn.BatchNorm2d(6)
        self.more = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        cells = self.frozen(self.norm(self.conv(x)))
        return {"cells": self.more(cells.relu()), "image": x}


class SmallModel(nn.Module):
    input_format = "RGB"

    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = Backbone()
        settings = {"in_feature": "cells", "alpha": 0.0, "beta": 0.0} | options
        self.exemplars = ExemplarContrast(**settings)
        for name, value in (("mean", [10.0, 20, 30]), ("std", [60.0, 70, 80])):
            self.register_buffer(f"pixel_{name}", torch.tensor(value).view(-1, 1, 1), False)
        shake_norms(self, seed)

    @property
    def device(self):
        return self.pixel_mean.device

    def forward(self, images):
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)["cells"]
        if not self.training:
            return features
        left = torch.zeros(len(images), *images.shape[-2:])
        left[:, :, : images.shape[-1] // 2] = 1
        return {"loss_exemplar": self.exemplars(features, left, [1] * len(images))}


def noise_images(seed=0, count=2, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator) * 255


def encode_slowly(model, image, mask, in_feature, divisibility=32):
    """One exemplar alone: RGB (H, W, 3) uint8, (H, W) bool -> (C,) float64."""
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    pixels = pixels if model.input_format == "RGB" else pixels[[2, 1, 0]]
    height, width = (math.ceil(side / divisibility) * divisibility for side in mask.shape)
    padded = torch.zeros(1, 3, height, width)
    padded[0, :, : image.shape[0], : image.shape[1]] = (pixels - model.pixel_mean) / model.pixel_std
    whole = torch.zeros(height, width)
    whole[: mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask)
    with torch.no_grad():
        return embed_slowly(model.backbone(padded)[in_feature][0], whole)


# Scenes as files.


def write_scenes(folder, count=4):
    """Dataset dicts of images of 64 x 80 pixels with three objects each."""
    rng = np.random.default_rng(0)
    dicts = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.fromarray(patches(rng, 64, 80).transpose(1, 2, 0)).save(path)
        annotations = [
            {
                "bbox": [0, 0, 1, 1],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": encoded,
            }
            for encoded in encode_masks(rectangles(rng, 3, 64, 80))
        ]
        size = {"height": 64, "width": 80}
        dicts.append({"file_name": str(path), "image_id": i, "annotations": annotations, **size})
    return dicts
