"""The slides' figures of spectral segmentation, remade with what needs no downloads.

    export DETECTRON2_DATASETS=DIR        for --coco: its val2017, or a part of it
    OMP_NUM_THREADS=1 python dev/experiments/spectral_figures.py --output DIR [--coco]

Features of photographs are the filter bank's, at stride 8 (patches of 8 pixels, the shorter side
320), with a small weight of the position (0.3, chosen on 40 images of COCO's train2017): a ViT with
random weights shows nothing. Photographs are those that come with scikit-image and
scikit-learn. Written are:

* channels.png: the six channels of lowest and of highest entropy, of a photograph's features and
  of a synthetic scene's (see spectral_features.py).
* deviation.png: of each channel, its deviation over the patches against the mean absolute
  difference of its means over pairs of instances (the slides' Fig. 5); with --coco also on COCO.
* eigenvectors.png: of each photograph, Fiedler vector, foreground, eigenvectors, masks.
* background.png: the eigenvectors of one photograph and of the first synthetic scene where it
  matters, with the background as published (reference) and as one node (quotient).
"""

import argparse
import importlib.resources
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from report import write_whole
from runner import ROOT, say
from spectral_ablation import arm_settings
from spectral_features import KINDS, FeatureRecipe, PatchScene, patch_scenes

# isort: split
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from unseg.config import load_config
from unseg.data.image import read_image
from unseg.data.instance_map import instance_index_map
from unseg.data.mappers import ResizeShortestEdge
from unseg.discovery.spectral import Segments, channel_entropy, segment
from unseg.engine.drawing import draw_instances
from unseg.modeling.meta_arch.deep_spectral import DeepSpectral
from unseg.structures import sample_on_grid

CONFIG = ROOT / "projects/DeepSpectral/configs/deep_spectral_filter_bank.yaml"
OVERRIDES = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FILTER_BANK.POSITION_WEIGHT": 0.3,
    "MODEL.DEEP_SPECTRAL.OUTPUT_INTERMEDIATES": True,
}
COCO = "unseg_coco_2017_val_cls_agnostic"
PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
}
SHOWN = 6  # channels of each end
SCENE_GRID, SCENE_SEED = (30, 30), 101
COLORS = ("tab:blue", "tab:orange", "tab:gray")  # of KINDS


class Photographs:
    """The model on photographs, with all that it computes on the way."""

    def __init__(self, background: str = "quotient"):
        overrides = OVERRIDES | {"MODEL.DEEP_SPECTRAL.BACKGROUND": background}
        self.cfg = load_config(str(CONFIG), [x for pair in overrides.items() for x in pair])
        self.model: DeepSpectral = build_model(self.cfg).eval()
        inputs = self.cfg.INPUT
        self.resize = ResizeShortestEdge([inputs.MIN_SIZE_TEST] * 2, inputs.MAX_SIZE_TEST)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """RGB (H, W, 3) to the model's input (3, h', w')."""
        resized = self.resize.get_transform(image).apply_image(image)
        channels = resized if self.cfg.INPUT.FORMAT == "RGB" else resized[:, :, ::-1]
        return torch.from_numpy(np.ascontiguousarray(channels.transpose(2, 0, 1)))

    @torch.no_grad()
    def features(self, image: np.ndarray) -> torch.Tensor:
        """(C, h, w)."""
        batch = (self.prepare(image).float() - self.model.pixel_mean) / self.model.pixel_std
        return self.model.backbone(batch[None])[self.model.in_feature][0]

    def segments(self, image: np.ndarray) -> tuple[Segments, np.ndarray]:
        """What was found, and the masks (K, H, W) bool."""
        height, width = image.shape[:2]
        inputs = {"image": self.prepare(image), "height": height, "width": width}
        (found,) = self.model([inputs])
        return found["segments"], found["instances"].pred_masks.cpu().numpy()


def photograph(name: str) -> np.ndarray:
    """RGB (H, W, 3) uint8."""
    package, file_name = PHOTOGRAPHS[name]
    with importlib.resources.as_file(importlib.resources.files(package) / file_name) as path:
        return read_image(str(path))


def instance_differences(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each channel, the mean absolute difference of its means over pairs of instances.

    Args:
        features: (C, h, w).
        labels: (h, w) integers, 0 for background; at least two others.

    Returns:
        (C,) float64.
    """
    numbers = np.unique(labels[labels > 0])
    means = np.stack([features[:, labels == n].mean(axis=1, dtype=np.float64) for n in numbers])
    return np.mean([np.abs(a - b) for a, b in itertools.combinations(means, 2)], axis=0)


def deviations(features: np.ndarray) -> np.ndarray:
    """Standard deviation of each channel of (C, h, w) over the patches."""
    return features.std(axis=(1, 2), dtype=np.float64)


def entropies(features: np.ndarray) -> np.ndarray:
    """Of each channel of (C, h, w), in bits."""
    flat = torch.from_numpy(features).flatten(1).t().contiguous()
    return channel_entropy(flat).numpy()


def coco_features(
    photographs: Photographs, limit: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and patch labels of the images with two or more instances on the grid."""
    for record in DatasetCatalog.get(COCO)[:limit]:
        index_map = instance_index_map(record["annotations"], record["height"], record["width"])
        features = photographs.features(read_image(record["file_name"])).numpy()
        labels = sample_on_grid(index_map, features.shape[1:], mode="majority")
        if len(np.unique(labels[labels > 0])) > 1:
            yield features, labels


# The figures.


def draw_channels(photographs: Photographs, scene: PatchScene, name: str = "astronaut") -> Figure:
    """Channels of lowest and highest entropy, of a photograph and of a scene."""
    image = photograph(name)
    rows = (
        ("photograph, filter bank", image, photographs.features(image).numpy(), None),
        ("synthetic scene", scene.labels, scene.features, scene.kinds),
    )
    figure = Figure(figsize=(10.5, 7), dpi=80, layout="constrained")
    panels = figure.subplots(4, SHOWN + 1)
    for (title, picture, features, kinds), (low, high) in zip(rows, panels.reshape(2, 2, -1)):
        entropy = entropies(features)
        order = np.argsort(entropy, kind="stable")
        _show(low[0], picture, title, cmap=None if picture.ndim == 3 else "tab10")
        high[0].set_axis_off()
        for line, ends in ((low, order[:SHOWN]), (high, order[-SHOWN:])):
            for panel, channel in zip(line[1:], ends):
                kind = "" if kinds is None else f", {KINDS[kinds[channel]]}"
                _show(panel, features[channel], f"{entropy[channel]:.2f} bit{kind}")
        for line, text in ((low, "lowest\nentropy"), (high, "highest\nentropy")):
            _name_row(line[1], text)
    return figure


def draw_deviation(
    scenes: Sequence[PatchScene], images: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[Figure, dict[str, float]]:
    """Deviation against difference between instances; the correlations by panel.

    Args:
        scenes: the first is drawn; correlations are means over all.
        images: features and labels of photographs with the same channels; may be empty. A channel
            is drawn with its means over all of them.
    """
    figure = Figure(figsize=(5.0 + 4.5 * bool(images), 4.2), dpi=80, layout="constrained")
    panels = figure.subplots(1, 1 + bool(images), squeeze=False)[0]
    points = [(deviations(s.features), instance_differences(s.features, s.labels)) for s in scenes]
    mean = {"scenes": float(np.mean([correlation(*p) for p in points]))}
    rest = [correlation(*(x[s.kinds < 2] for x in p)) for s, p in zip(scenes, points)]
    quiet = mean["scenes, no noisy channels"] = float(np.mean(rest))
    for kind, color in zip(range(len(KINDS)), COLORS):
        chosen = scenes[0].kinds == kind
        panels[0].scatter(*(p[chosen] for p in points[0]), s=8, color=color, label=KINDS[kind])
    panels[0].legend(fontsize="small")
    panels[0].set_title(
        f"a synthetic scene, {len(scenes[0].kinds)} channels: r = {correlation(*points[0]):.2f}\n"
        f"(over {len(scenes)} scenes: {mean['scenes']:.2f}; without noisy ones: {quiet:.2f})",
        fontsize="small",
    )
    if images:
        points = [(deviations(f), instance_differences(f, labels)) for f, labels in images]
        each = float(np.mean([correlation(*p) for p in points]))
        means = np.mean(points, axis=0)
        mean |= {"coco": each, "coco, means of channels": correlation(*means)}
        panels[1].scatter(*means, s=8, color="tab:green")
        panels[1].set_title(
            f"filter bank, {len(means[0])} channels, means over {len(images)} COCO images: "
            f"r = {mean['coco, means of channels']:.2f}\n(mean of r within an image: {each:.2f})",
            fontsize="small",
        )
    for panel in panels:
        panel.set_xlabel("deviation over the patches")
        panel.set_ylabel("difference between instances")
    return figure, mean


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's."""
    return float(np.corrcoef(a, b)[0, 1])


def draw_eigenvectors(photographs: Photographs, names: Sequence[str]) -> Figure:
    """A row per photograph: image, Fiedler vector, foreground, eigenvectors, masks."""
    count = photographs.model.settings.num_eigenvectors
    figure = Figure(figsize=(1.5 * (count + 4), 1.12 * len(names)), dpi=80, layout="constrained")
    titles = ["image", "Fiedler vector", "foreground"]
    titles += [f"eigenvector {k + 1}" for k in range(count)] + ["masks"]
    for name, row in zip(names, figure.subplots(len(names), len(titles), squeeze=False)):
        image = photograph(name)
        segments, masks = photographs.segments(image)
        pictures = [image, *_maps(segments, count), draw_instances(image, masks)]
        for title, panel, picture in zip(titles, row, pictures):
            _show(panel, picture, title if name == names[0] else "")
    return figure


def draw_background(
    pictures: Sequence[tuple[str, np.ndarray, Callable[[str], Segments]]],
) -> Figure:
    """Reference above quotient, for each (title, image or labels, segments by BACKGROUND)."""
    modes = ("reference", "quotient")
    names = ["foreground", *(f"eigenvector {k + 1}" for k in range(4)), "segments"]
    figure = Figure(figsize=(10.5, 2.7 * len(pictures)), dpi=80, layout="constrained")
    panels = figure.subplots(2 * len(pictures), 7).reshape(len(pictures), 2, 7)
    for (title, picture, segment_as), rows in zip(pictures, panels):
        _show(rows[0, 0], picture, title, cmap=None if picture.ndim == 3 else "tab10")
        rows[1, 0].set_axis_off()
        for mode, row in zip(modes, rows):
            segments = segment_as(mode)
            maps = [*_maps(segments, 4)[1:], segments.labels.numpy()]
            for panel, name, values in zip(row[1:], names, maps):
                lost = "eigen" in name and not np.nan_to_num(values).any()
                _show(
                    panel,
                    np.full_like(values, np.nan) if lost else values,
                    f"{name}: lost" if lost else name,
                    cmap="tab10" if name == "segments" else "viridis",
                )
            _name_row(row[1], mode)
    return figure


def _name_row(panel: Axes, text: str) -> None:
    panel.set_axis_on()
    panel.set(xticks=[], yticks=[])
    panel.set_ylabel(text, fontsize="small")


def _maps(segments: Segments, count: int) -> list[np.ndarray]:
    """Fiedler vector, foreground and eigenvectors; what there is not is blank."""
    blank = torch.full(segments.labels.shape, float("nan"))
    embedding = segments.embedding
    maps = [segments.fiedler, segments.foreground]
    maps += [None] * count if embedding is None else list(embedding)
    maps = [blank if m is None else m.float() for m in maps]
    if embedding is not None:  # the background's zeros would squeeze the colours
        maps[2:] = [torch.where(segments.foreground, m, float("nan")) for m in maps[2:]]
    return [m.numpy() for m in maps]


def _show(panel: Axes, picture: np.ndarray, title: str, *, cmap: str | None = "viridis") -> None:
    if picture.ndim == 3:
        picture = np.asarray(Image.fromarray(picture).resize(_thumbnail(picture)))
    if cmap == "tab10":
        low, high = 0, 9
    else:  # a few extreme patches would leave one colour for all others
        low, high = np.nanpercentile(picture, (1, 99)) if np.isfinite(picture).any() else (0, 1)
    panel.imshow(picture, cmap=cmap, interpolation="nearest", vmin=low, vmax=high)
    panel.set_title(title, fontsize="small")
    panel.set_axis_off()


def _thumbnail(picture: np.ndarray) -> tuple[int, int]:
    height, width = picture.shape[:2]
    factor = min(1.0, 240 / max(height, width))
    return round(width * factor), round(height * factor)


def save(figure: Figure, path: Path) -> None:
    """A PNG with a palette: a third of the size, and heat maps need no more colours."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    small = io.BytesIO()
    picture = Image.open(file).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    write_whole(path, small.getvalue())
    say(f"{path}: {len(small.getvalue()) / 1000:.0f} kB")


def scene_segments(scene: PatchScene, background: str) -> Segments:
    """Of a synthetic scene, the number of objects known."""
    settings = replace(arm_settings("full"), background=background)
    return segment(torch.from_numpy(scene.features), settings, scene.num_objects)


def lost_vectors(segments: Segments) -> int:
    """How many eigenvectors vanish on the foreground."""
    maps = segments.embedding
    return 0 if maps is None else int((maps == 0).flatten(1).all(dim=1).sum())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--coco", action="store_true", help="deviation.png also on COCO images")
    parser.add_argument("--photographs", nargs="+", choices=list(PHOTOGRAPHS), metavar="NAME")
    parser.add_argument("--scenes", type=int, default=20, help="for the correlation")
    args = parser.parse_args()
    args.photographs = args.photographs or list(PHOTOGRAPHS)
    return args


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    photographs = Photographs()
    scenes = list(patch_scenes(SCENE_GRID, SCENE_SEED, args.scenes, FeatureRecipe()))
    save(draw_channels(photographs, scenes[0]), args.output / "channels.png")
    images = list(coco_features(photographs)) if args.coco else []
    figure, correlations = draw_deviation(scenes, images)
    save(figure, args.output / "deviation.png")
    say(f"correlations: {correlations}")
    save(draw_eigenvectors(photographs, args.photographs), args.output / "eigenvectors.png")
    published = Photographs("reference")
    for name in args.photographs:
        segments, _ = published.segments(photograph(name))
        say(f"{name}, as published: {lost_vectors(segments)} of 4 eigenvectors lost")
    name = args.photographs[0]
    image = photograph(name)
    matters = (s for s in scenes if lost_vectors(scene_segments(s, "reference")))
    scene = next(matters, scenes[0])
    rows = [
        (name, image, lambda mode: Photographs(mode).segments(image)[0]),
        ("synthetic scene", scene.labels, lambda mode: scene_segments(scene, mode)),
    ]
    save(draw_background(rows), args.output / "background.png")


if __name__ == "__main__":
    main()
