"""Times the renderer of the synthetic scenes: images a second of one process, on one thread.

    python dev/benchmarks/synthetic.py               100 scenes of unseg_synthetic_train
    python dev/benchmarks/synthetic.py --dataset unseg_synthetic_val_lvis --count 50

Times are CPU time of the process, so other work on the machine matters little. The first scene is
not counted: it makes the textures that all later ones share.
"""

import argparse
import sys
import time

import cv2
import numpy as np
import torch

from unseg.compat import cpu_name
from unseg.data.datasets.synthetic import SceneSet, render_scene, scene_set


def images_per_second(scenes: SceneSet, count: int, *, with_image: bool) -> float:
    """Scenes rendered per second of CPU time, the first one not counted."""
    render_scene(scenes.settings, scenes.seed, 0, with_image=with_image)
    start = time.process_time()
    for index in range(1, count + 1):
        render_scene(scenes.settings, scenes.seed, index % scenes.count, with_image=with_image)
    return count / (time.process_time() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="unseg_synthetic_train", help="a set of still scenes")
    parser.add_argument("--count", type=int, default=100, help="scenes to render")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    scenes = scene_set(args.dataset)
    if scenes.settings.frames > 1:
        sys.exit(f"{args.dataset} holds clips: name a set of still scenes")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    write = sys.stdout.write
    write(f"{cpu_name()}; numpy {np.__version__}, OpenCV {cv2.__version__}\n")
    height, width = scenes.settings.size
    write(f"{args.count} scenes of {args.dataset}, {height} x {width}, one process, CPU time\n")
    for title, with_image in (("pictures and masks", True), ("masks alone", False)):
        rate = images_per_second(scenes, args.count, with_image=with_image)
        write(f"  {title:20}{rate:8.1f} images/s\n")


if __name__ == "__main__":
    main()
