"""Names in Detectron2's catalogs for the sets of scenes. Registering renders nothing."""

import re
from dataclasses import replace

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from unseg.data.datasets.synthetic.catalogue import (
    FAMILY_NAMES,
    PART_NAMES,
    build_catalogue,
    frequency_groups,
    thing_and_part_groups,
)
from unseg.data.datasets.synthetic.presets import (
    BUILT_IN_SETS,
    PRESET_STYLES,
    STYLES,
    SceneSet,
    find_preset,
)
from unseg.data.datasets.synthetic.records import load_records
from unseg.data.datasets.synthetic.settings import SceneSettings
from unseg.data.datasets.synthetic.uri import PREFIX, SyntheticPathHandler

EVALUATOR_TYPES = {
    "instances": "coco_class_agnostic",
    "lvis": "lvis",
    "parts": "coco_class_agnostic",
    "video": "ytvis",
    "frames": "coco_class_agnostic",
}
_HANDLER = SyntheticPathHandler()
_REGISTERED: dict[str, SceneSet] = {}


def register_synthetic_datasets() -> None:
    """Register every built-in set as `unseg_synthetic_<split>`; a second call does nothing.

    Clips are there twice: `unseg_synthetic_val_video` has one dict per clip and
    `unseg_synthetic_val_video_frames` one per frame.
    """
    for scenes in BUILT_IN_SETS:
        _register(f"unseg_synthetic_{scenes.split}", scenes)
        if scenes.style == "lvis":
            _register(f"unseg_synthetic_{scenes.split}_parts", replace(scenes, style="parts"))
        if scenes.style == "video":
            _register(f"unseg_synthetic_{scenes.split}_frames", replace(scenes, style="frames"))


def register_synthetic(
    name: str,
    preset: str | SceneSettings = "default",
    seed: int = 0,
    count: int = 200,
    *,
    style: str | None = None,
) -> None:
    """Register a set of your own scenes; its images are `unseg-synthetic://<name>/000000.bmp`, ...

    name: the dataset's name, of letters, digits and "_.-". preset: a preset's name or settings.
    style: see `SceneSet`; by default what suits the preset. The same call again does nothing.
    Raises ValueError for a name that is taken, as a dataset's or (like "train") as the folder of a
    built-in set's images, and for arguments that make no set.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"name: letters, digits and '_.-' only, got {name!r}")
    if seed < 0 or count < 1:
        raise ValueError(f"{name}: seed >= 0 and count >= 1 are needed, got {seed} and {count}")
    settings = find_preset(preset) if isinstance(preset, str) else preset
    is_clip = settings.frames > 1
    if style is None:
        known = PRESET_STYLES.get(preset, "instances") if isinstance(preset, str) else "instances"
        style = "video" if is_clip else known
    if style not in STYLES or is_clip != (style in ("video", "frames")):
        raise ValueError(
            f"{name}: style {style!r} does not suit {settings.frames} frame(s); 'video' and "
            "'frames' need clips, 'instances', 'lvis' and 'parts' need still scenes"
        )
    _register(name, SceneSet(name, settings, seed, count, style))


def scene_set(name: str) -> SceneSet:
    """The set behind a registered dataset name; ValueError if the name is not one of these."""
    if name not in _REGISTERED:
        raise ValueError(f"{name!r} is no synthetic dataset; there are: {sorted(_REGISTERED)}")
    return _REGISTERED[name]


def _register(name: str, scenes: SceneSet) -> None:
    if _REGISTERED.get(name) == scenes and name in DatasetCatalog.list():
        return
    if name in DatasetCatalog.list():
        raise ValueError(f"dataset {name!r} is already registered with other contents")
    for other, taken in _REGISTERED.items():
        # The images of a split are one folder of URIs: its data sets must show the same scenes.
        same_folder = taken.split == scenes.split and other in DatasetCatalog.list()
        if same_folder and replace(taken, style=scenes.style) != scenes:
            raise ValueError(
                f"{PREFIX}{scenes.split}/ holds the images of {other!r}: choose another name "
                f"than {name!r}"
            )
    PathManager.register_handler(_HANDLER)
    _HANDLER.sets[scenes.split] = scenes
    _REGISTERED[name] = scenes
    DatasetCatalog.register(name, lambda: load_records(scenes))
    settings, with_parts = scenes.settings, scenes.style == "parts"
    names = build_catalogue(settings.num_categories, settings.catalogue_seed).names
    families = [FAMILY_NAMES[c % len(FAMILY_NAMES)] for c in range(settings.num_categories)]
    metadata = MetadataCatalog.get(name)
    metadata.set(
        thing_classes=names + list(PART_NAMES) * with_parts,
        evaluator_type=EVALUATOR_TYPES[scenes.style],
        image_root=PREFIX + scenes.split,
        thing_families=families + ["part"] * len(PART_NAMES) * with_parts,
    )
    if settings.categories is not None:
        metadata.set(shown_categories=list(settings.categories))
    if with_parts:
        metadata.set(thing_frequencies=thing_and_part_groups(settings))
    if scenes.style == "lvis":
        metadata.set(
            thing_frequencies=frequency_groups(settings.num_categories),
            part_classes=list(PART_NAMES),
        )
