"""Short clips: a scene whose objects move, turn and cross while the camera drifts.

Objects keep their numbers through a clip; a frame in which one is hidden or outside the picture has
an empty mask for it. The middle of the clip is the scene as it was laid out, so every object is
visible there.
"""

from dataclasses import dataclass, replace

import numpy as np

from unseg.data.datasets.synthetic.layout import sample_scene
from unseg.data.datasets.synthetic.plan import ScenePlan
from unseg.data.datasets.synthetic.scene import Scene, render_plan, scene_rng
from unseg.data.datasets.synthetic.settings import SceneSettings

STEP = 0.02  # of the shorter side per frame, for an object of usual speed


@dataclass(frozen=True)
class _Motion:
    """Change per frame: (x, y) in pixels, turn in radians, logarithm of the zoom."""

    velocity: tuple[float, float]
    spin: float
    growth: float


def render_clip_frame(
    settings: SceneSettings, seed: int, index: int, frame: int, *, with_image: bool = True
) -> Scene:
    """One frame of the clip of (settings, seed, index); `masks` has a row for every object.

    Raises ValueError for a frame that the clip does not have.
    """
    if not 0 <= frame < settings.frames:
        raise ValueError(f"frame must be in 0..{settings.frames - 1}, got {frame}")
    rng = scene_rng(seed, index)
    plan = sample_scene(settings, rng)
    motions = [_sample_motion(rng, settings) for _ in plan.objects]
    camera = 0.3 * np.array(_sample_motion(rng, settings).velocity)
    frame_rng = scene_rng(seed, index, frame + 1)
    posed = _at(plan, motions, camera, frame - 0.5 * (settings.frames - 1))
    offset = (int(frame_rng.integers(256)), int(frame_rng.integers(256)))
    return render_plan(replace(posed, noise_offset=offset), with_image=with_image, keep_empty=True)


def render_clip(
    settings: SceneSettings, seed: int, index: int, *, with_image: bool = True
) -> list[Scene]:
    """All frames of a clip, in time."""
    return [
        render_clip_frame(settings, seed, index, frame, with_image=with_image)
        for frame in range(settings.frames)
    ]


def _sample_motion(rng: np.random.Generator, settings: SceneSettings) -> _Motion:
    pixels = STEP * min(settings.size) * settings.speed * float(rng.uniform(0.2, 1.8))
    heading = float(rng.uniform(0, 2 * np.pi))
    return _Motion(
        velocity=(pixels * float(np.cos(heading)), pixels * float(np.sin(heading))),
        spin=0.05 * settings.speed * float(rng.normal()),
        growth=0.015 * settings.speed * float(rng.normal()),
    )


def _at(plan: ScenePlan, motions: list[_Motion], camera: np.ndarray, time: float) -> ScenePlan:
    """The scene `time` frames after the one it was laid out in."""
    shift = camera * time
    objects = tuple(
        entry.moved(
            x=entry.pose.x + float(motion.velocity[0] * time + shift[0]),
            y=entry.pose.y + float(motion.velocity[1] * time + shift[1]),
            angle=entry.pose.angle + motion.spin * time,
            zoom=float(np.exp(motion.growth * time)),
        )
        for entry, motion in zip(plan.objects, motions)
    )
    return replace(plan, objects=objects, camera=(float(shift[0]), float(shift[1])))
