"""Synthetic scenes with exact masks: photographs-like pictures from a seed, nothing to download.

`render_scene(settings, seed, index)` and `render_clip` make pictures with their truth;
`register_synthetic_datasets()` puts the built-in sets into Detectron2's catalogs as
`unseg_synthetic_*`, `register_synthetic(name, preset, seed, count)` a set of your own. Pictures are
files to Detectron2 (`unseg-synthetic://val/000003.bmp`), rendered when they are opened.
Look at them with `python -m unseg.data.datasets.synthetic --output sheet.png --with-masks`.
"""

from unseg.data.datasets.synthetic.clips import render_clip, render_clip_frame
from unseg.data.datasets.synthetic.contact_sheet import contact_sheet
from unseg.data.datasets.synthetic.presets import PRESETS, SceneSet
from unseg.data.datasets.synthetic.records import lvis_ground_truth
from unseg.data.datasets.synthetic.register import (
    register_synthetic,
    register_synthetic_datasets,
    scene_set,
)
from unseg.data.datasets.synthetic.scene import Scene, render_scene
from unseg.data.datasets.synthetic.settings import SceneSettings

__all__ = [
    "PRESETS",
    "Scene",
    "SceneSet",
    "SceneSettings",
    "contact_sheet",
    "lvis_ground_truth",
    "register_synthetic",
    "register_synthetic_datasets",
    "render_clip",
    "render_clip_frame",
    "render_scene",
    "scene_set",
]
