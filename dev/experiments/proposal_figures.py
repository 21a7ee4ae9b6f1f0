"""Pictures of what the networks of proposals.py have learned, from its folder.

    OMP_NUM_THREADS=1 python dev/experiments/proposal_figures.py --experiment output/proposals \
        --output projects/InstanceFCN/figures

* proposals.png: the first scenes that were measured with two objects or more; their objects, and
  of each network as many proposals as there are objects: the best scores after a mask NMS at 0.5.
* score_maps.png: the nine score maps of k = 3 for the first of these scenes (probabilities,
  white is 1); below, the scene and the masks of its best windows, one per object.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from proposals import ARMS, TEST_SET
from report import write_whole
from runner import ROOT, say

# isort: split
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure
from proposal_measures import load_model
from torch import Tensor, nn

from unseg.config import load_config
from unseg.data.image import read_image
from unseg.data.instance_map import instance_index_map
from unseg.engine.drawing import draw_instances
from unseg.layers import mask_nms

SHOWN = ("deepmask", "sharpmask", "instance_fcn_k1", "instance_fcn_k3", "instance_fcn_k5")
SCENES = 5
_NMS = 0.5


def load(experiment: Path, arm: str, seed: int) -> nn.Module:
    """The network that an arm has trained."""
    overrides = dict(ARMS[arm].overrides)
    overrides |= {"MODEL.WEIGHTS": str(experiment / f"seed{seed}/{arm}/model_final.pth")}
    words = [str(word) for item in overrides.items() for word in item]
    return load_model(load_config(str(ARMS[arm].config), ["MODEL.DEVICE", "cpu", *words]))


def scenes(name: str, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first scenes with two objects or more: image (H, W, 3) and masks (N, H, W)."""
    found = []
    for record in DatasetCatalog.get(name):
        if len(record["annotations"]) < 2:
            continue
        image = read_image(record["file_name"], "RGB")
        ids = instance_index_map(record["annotations"], *image.shape[:2])
        found.append((image, np.stack([ids == n for n in range(1, ids.max() + 1)])))
        if len(found) == count:
            break
    return found


def as_input(image: np.ndarray) -> dict[str, Tensor]:
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


def best_masks(model: nn.Module, image: np.ndarray, count: int) -> np.ndarray:
    """The masks of the best scores that differ, at most (count, H, W)."""
    (output,) = model([as_input(image)])
    proposals = output["proposals"][:300]
    masks = proposals.pred_masks.tensor
    kept = mask_nms(masks, proposals.objectness_logits, _NMS)[:count]
    return masks[kept].numpy()


def draw_proposals(
    models: dict[str, nn.Module], found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> bytes:
    """A row per scene, a column per network after that of the objects."""
    columns = ["objects", *(ARMS[arm].title for arm in models)]
    size = (1.9 * len(columns), 2.0 * len(found))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(len(found), len(columns), squeeze=False)
    for title, panel in zip(columns, panels[0], strict=True):
        panel.set_title(title, fontsize="small")
    for row, (image, objects) in zip(panels, found, strict=True):
        shown = [objects, *(best_masks(model, image, len(objects)) for model in models.values())]
        for panel, masks in zip(row, shown, strict=True):
            panel.imshow(draw_instances(image, masks))
            panel.axis("off")
    return save(figure)


def draw_score_maps(model: nn.Module, image: np.ndarray, objects: np.ndarray) -> bytes:
    """The k * k maps of an InstanceFCN with one level, and what its windows make of them."""
    k = model.head.k
    (maps,) = model._maps(as_input(image)["image"][None])
    channels = maps.masks[0].sigmoid()
    masks = best_masks(model, image, len(objects))
    count = max(k, 1 + len(masks))
    figure = Figure(figsize=(1.5 * count, 1.55 * (k + 1)), dpi=110, layout="constrained")
    panels = figure.subplots(k + 1, count)
    for panel in panels.ravel():
        panel.axis("off")
    for n, channel in enumerate(channels):
        panels[n // k, n % k].imshow(channel, cmap="gray", vmin=0, vmax=1)
    panels[k, 0].imshow(image)
    for panel, mask in zip(panels[k, 1:], masks):
        panel.imshow(draw_instances(image, mask[None]))
    return save(figure)


def save(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", type=Path, default=ROOT / "output/proposals")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", default=TEST_SET, metavar="NAME")
    parser.add_argument("--arms", nargs="+", default=SHOWN, choices=[*ARMS])
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Entry point."""
    args = parse_arguments()
    found = scenes(args.data, SCENES)
    models = {arm: load(args.experiment, arm, args.seed) for arm in args.arms}
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = {"proposals.png": draw_proposals(models, found)}
    if "instance_fcn_k3" in models:
        pictures["score_maps.png"] = draw_score_maps(models["instance_fcn_k3"], *found[0])
    for name, content in pictures.items():
        write_whole(args.output / name, content)
        say(f"wrote {args.output / name}")


if __name__ == "__main__":
    main()
