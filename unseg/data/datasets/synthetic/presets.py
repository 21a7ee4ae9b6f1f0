"""Named scene settings, and the sets of scenes that come with the package.

Tune on `train` and `val`; report on `val_fresh`, whose seed nobody has looked at.
"""

from dataclasses import dataclass

from unseg.data.datasets.synthetic.settings import SceneSettings

# One category of each family, from head to tail, that training scenes of `heldout` never show.
HELDOUT_CATEGORIES = (3, 6, 10, 13, 17, 20)
SEEN_CATEGORIES = tuple(c for c in range(24) if c not in HELDOUT_CATEGORIES)

STYLES = ("instances", "lvis", "parts", "video", "frames")

PRESETS: dict[str, SceneSettings] = {
    # Cluttered scenes of about three objects: the demo, the tests, the ablation tables.
    "default": SceneSettings(),
    # One large object near the middle, all categories equally frequent.
    "single": SceneSettings(
        mean_objects=1.0, max_objects=1, area=(0.08, 0.32), centre=0.14, min_visible=0.8, zipf=0.0
    ),
    # Groups of one or two objects of a category; the two have one look and touch.
    "touching": SceneSettings(
        mean_objects=1.5, max_objects=5, pairs=0.75, area=(0.02, 0.11), min_visible=0.6
    ),
    # A steeper long tail, and every part of a category on each of its instances.
    "lvis": SceneSettings(zipf=1.2, optional_parts=1.0),
    # Moving, turning, crossing objects under a drifting camera.
    "video": SceneSettings(frames=12, speed=2.0, strips=3.0, area=(0.015, 0.11)),
    "heldout_train": SceneSettings(categories=SEEN_CATEGORIES),
    "heldout_val": SceneSettings(categories=HELDOUT_CATEGORIES),
}
PRESET_STYLES = {"lvis": "lvis", "video": "video"}


@dataclass(frozen=True)
class SceneSet:
    """A list of scenes or clips: `count` indices of (settings, seed).

    split: the set's folder in `unseg-synthetic://<split>/`. style: the form of its dataset dicts,
    one of STYLES: instances; lvis (with parts and frequency groups); parts (objects and their parts
    alike as annotations); video (one dict per clip); frames (one dict per frame of every clip).
    """

    split: str
    settings: SceneSettings
    seed: int
    count: int
    style: str = "instances"


def find_preset(preset: str) -> SceneSettings:
    """The settings of a named preset; ValueError with all names if there is none."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; presets: {', '.join(PRESETS)}")
    return PRESETS[preset]


def _built_in_sets() -> tuple[SceneSet, ...]:
    """Sets by preset: images in three roles (train, val, val_fresh) with seeds of their own."""
    roles = (("train", 1, 1500, 150), ("val", 2, 200, 20), ("val{}_fresh", 3, 200, 20))
    sets = []
    for number, (kind, train, val) in enumerate(
        (
            ("", "default", "default"),
            ("_single", "single", "single"),
            ("_touching", "touching", "touching"),
            ("_lvis", "lvis", "lvis"),
            ("_video", "video", "video"),
            ("_heldout", "heldout_train", "heldout_val"),
        )
    ):
        for role, seed, images, clips in roles:
            preset = train if role == "train" else val
            split = role.format(kind) if "{}" in role else role + kind
            style = PRESET_STYLES.get(preset, "instances")
            count = clips if style == "video" else images
            sets.append(SceneSet(split, PRESETS[preset], 100 * number + seed, count, style))
    return tuple(sets)


BUILT_IN_SETS = _built_in_sets()
