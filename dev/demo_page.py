"""The pictures and the page of the demo."""

import html
import json
from collections import defaultdict
from pathlib import Path

import unseg  # noqa: F401 (registers the data sets; before detectron2, whose import warns)

# isort: split
import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as mask_util

from unseg.data.image import read_image
from unseg.discovery import load_pseudo_masks
from unseg.engine.drawing import draw_instances, side_by_side

Picture = tuple[str, Path]  # caption, file
_SCENE_SCALE = 2  # the scenes are small
_SCENES = 12
_CONFIDENT = 0.3  # predictions below are not drawn

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>unseg demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1360px; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .9rem; text-align: right }}
td:first-child {{ text-align: left }} tr {{ border-bottom: 1px solid #ccc }}
figure {{ margin: 0 0 1.2rem }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
.photographs {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }}
</style></head><body>
<h1>unseg demo</h1>
<p>{summary}</p>
{table}
<h2>Synthetic scenes: image, ground truth, free masks, FreeSOLO after two rounds</h2>
<p>Free masks are all that were found; predictions are those of score {confident} and more.</p>
{scenes}
<h2>Free masks on photographs, without any weights</h2>
<p>Hand-made features (colour, texture, position) outline what is coherent: a suit, a cup, a rocket,
and as often a piece of background. They split the cat and fail on the coins. With DenseCL or DINO
features the same commands give far better masks.</p>
<div class="photographs">{photographs}</div>
</body></html>
"""


def _masks(rles: list[dict], size: tuple[int, int]) -> np.ndarray:
    if not rles:
        return np.zeros((0, *size), dtype=bool)
    return mask_util.decode(rles).transpose(2, 0, 1).astype(bool)


def _enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _save(picture: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def draw_photographs(masks_file: Path, folder: Path, output: Path) -> list[Picture]:
    """Each photograph beside its masks."""
    pictures = []
    for record in load_pseudo_masks(masks_file):
        image = read_image(str(folder / record.file_name))
        masks = _masks([mask.rle for mask in record.masks], image.shape[:2])
        row = side_by_side([image, draw_instances(image, masks)])
        name = Path(record.file_name).stem
        pictures.append((f"{name}: {len(masks)} masks", _save(row, output / f"{name}.png")))
    return pictures


def draw_scenes(dataset: str, masks_file: Path, results: Path, output: Path) -> list[Picture]:
    """Rows of image, ground truth, pseudo-masks and confident predictions."""
    found = {record.image_id: record for record in load_pseudo_masks(masks_file)}
    predicted = defaultdict(list)
    for result in json.loads(results.read_text()):
        if result["score"] >= _CONFIDENT:
            predicted[result["image_id"]].append(result["segmentation"])
    pictures = []
    for scene in DatasetCatalog.get(dataset)[:_SCENES]:
        number = scene["image_id"]
        small = read_image(scene["file_name"])
        columns = (
            [annotation["segmentation"] for annotation in scene["annotations"]],
            [mask.rle for mask in found[number].masks],
            predicted[number],
        )
        image = _enlarge(small, _SCENE_SCALE)
        row = [image]
        for rles in columns:
            masks = _masks(rles, small.shape[:2])
            masks = masks.repeat(_SCENE_SCALE, axis=1).repeat(_SCENE_SCALE, axis=2)
            row.append(draw_instances(image, masks))
        caption = "scene {}: {} objects, {} free masks, {} predictions".format(
            number, *map(len, columns)
        )
        pictures.append((caption, _save(side_by_side(row), output / f"scene{number}.png")))
    return pictures


def _html_table(markdown: str) -> str:
    rows = [line.strip("|").split("|") for line in markdown.splitlines() if "---" not in line]
    cells = ["".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _figures(pictures: list[Picture], root: Path) -> str:
    return "\n".join(
        f'<figure><img src="{path.relative_to(root)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, path in pictures
    )


def write_page(
    output: Path, table: str, summary: str, photographs: list[Picture], scenes: list[Picture]
) -> Path:
    """Write index.html."""
    page = output / "index.html"
    page.write_text(
        _PAGE.format(
            summary=html.escape(summary),
            table=_html_table(table),
            confident=_CONFIDENT,
            scenes=_figures(scenes, output),
            photographs=_figures(photographs, output),
        )
    )
    return page
