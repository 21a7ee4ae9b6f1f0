"""FreeSOLO against Exemplar-FreeSOLO at the same budget, on synthetic scenes.

    OMP_NUM_THREADS=1 python dev/benchmarks/exemplar_freesolo.py            1.3 hours on one core
    OMP_NUM_THREADS=1 python dev/benchmarks/exemplar_freesolo.py --quick    minutes, no meaning

Processes with the same command line share the work, for example one on each core. Any of them may
be killed at any moment; the same command line goes on:

    export OMP_NUM_THREADS=1
    taskset -c 0 python dev/benchmarks/exemplar_freesolo.py > core0.txt &
    taskset -c 1 python dev/benchmarks/exemplar_freesolo.py > core1.txt &
    wait

Once: free masks of 1500 cluttered scenes of 24 categories (long-tailed); exemplars: 5 scenes of
each category that show one large object, of which nothing but the category's name is used.
For each seed: round 1, a FreeSOLO from random weights on the free masks; its masks of the same
scenes, filtered as unseg.tools.self_train does; the pool, whose masks round 1 refines.
Arms: round 2 on these masks, all with the same seed, budget and initial weights (round 1's averaged
ones). `freesolo` is plain, which is what lambda = 0 is; `lambda1.3x3` has lambda 1.3 and 3
exemplars of each category. `round1` shows what all begin with.

Measured on 200 fresh scenes, class-agnostic, in percent: AP50, AP and AR@100 of masks and boxes.
And what the paper sets out to mend, per image, among predictions of score 0.3 and more that match
no object (mask IoU below 0.5 with each): `fragments` have at least 80 % of their area inside one
object, all others are `false positives`. How many such `predictions` there are is in the table as
well: a model that is less sure has fewer of both. scenes.png: the first scenes of the first seed.
"""

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import unseg  # noqa: F401 (registers the data sets; before detectron2, whose import warns)

# isort: split
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import load_config
from unseg.data.image import read_image
from unseg.engine.drawing import draw_instances
from unseg.layers import mask_iou

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev/experiments"))
from report import write_whole  # noqa: E402
from runner import Experiment, ExperimentError, Step, experiment_parser, say  # noqa: E402

FREE_MASKS = ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml"
FREESOLO = ROOT / "projects/FreeSOLO/configs/freesolo_tiny.yaml"
EXEMPLAR = ROOT / "projects/ExemplarFreeSOLO/configs/exemplar_freesolo_tiny.yaml"
# Settings were tuned on unseg_synthetic_val; no choice was made on these.
TEST_SET = "unseg_synthetic_val_fresh"
EXEMPLAR_SET, PER_CATEGORY = "unseg_synthetic_train_single", 5
ARMS = {  # lambda, exemplars of each category
    "lambda0.5": (0.5, 1),
    "lambda1.3": (1.3, 1),
    "lambda2.0": (2.0, 1),
    "lambda1.3x3": (1.3, 3),
    "lambda1.3x5": (1.3, 5),
}
TITLES = {
    "round1": "round 1",
    "freesolo": "FreeSOLO (λ = 0)",
    **{arm: f"λ = {w}, {k} exemplar{'s' * (k > 1)}" for arm, (w, k) in ARMS.items()},
}
EXEMPLAR_KEYS = ("POOL", "WEIGHT", "PER_CATEGORY")
METRICS = ("AP50", "AP", "AR@100")
CONFIDENT = 0.3  # predictions below are neither counted nor drawn
SCENES = 8  # drawn


def write_exemplars(folder: Path) -> None:
    """Write the first scenes of each category as category/image.png; their masks are not used."""
    names = MetadataCatalog.get(EXEMPLAR_SET).thing_classes
    written = dict.fromkeys(names, 0)
    for scene in DatasetCatalog.get(EXEMPLAR_SET):
        (category,) = {annotation["category_id"] for annotation in scene["annotations"]}
        name = names[category]
        if written[name] < PER_CATEGORY:
            written[name] += 1
            path = folder / name / f"{scene['image_id']:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(read_image(scene["file_name"])).save(path)
    say(f"wrote {sum(written.values())} images of {len(names)} categories to {folder}")


class Plan:
    """The steps, in the order in which they are begun."""

    def __init__(self, args: argparse.Namespace):
        self.folder: Path = args.output
        self.seeds, self.arms = dict.fromkeys(args.seeds), dict.fromkeys(args.arms)
        self.train_set = "unseg_synthetic_train"
        self.training = {"SOLVER.MAX_ITER": args.iterations}
        self.labelling, self.always = labelling_overrides(), {}
        if args.quick:
            self.train_set = "unseg_synthetic_val"  # smaller
            # Cells of an untrained model have scores of 0.01, its masks any size: use them all.
            self.labelling = {"DISCOVERY.SCORE_THRESHOLD": 0.0}
            quick = {"SCORE_THR": 0.001, "UPDATE_THR": 0.0, "MAX_PER_IMG": 5}
            quick["FPN_SCALE_RANGES"] = [[1, 500]] * 3
            self.always = {f"MODEL.FREESOLO.{key}": value for key, value in quick.items()}

    def steps(self) -> list[Step]:
        """All of them: what all seeds share, then seed by seed."""
        free_masks = [
            *("-m", "unseg.tools.pseudo_masks", "--config-file", FREE_MASKS, "--resume"),
            *("--dataset", self.train_set, "--output", self.folder / "free_masks.json"),
        ]
        steps = [
            Step("free_masks", free_masks),
            Step("exemplars", [__file__, "--write-exemplars", self.folder / "exemplars"]),
        ]
        for seed in self.seeds:
            steps += [self._round1(seed), self._masks(seed), self._pool(seed)]
            steps += [self._round2(arm, seed) for arm in self.arms]
        return steps

    def training_folder(self, arm: str, seed: int) -> Path:
        """OUTPUT_DIR of a training."""
        return self.folder / f"seed{seed}" / ("round1/round1" if arm == "round1" else arm)

    def _weights(self, seed: int) -> Path:
        return self.training_folder("round1", seed) / "ema/model_final.pth"

    def _words(self, *overrides: Mapping[str, object]) -> list[str]:
        """KEY VALUE ..."""
        items = [item for part in (*overrides, self.always) for item in part.items()]
        return [str(word) for item in items for word in item]

    def _trained(self, arm: str, seed: int, command: list[str | Path], *needs: str) -> Step:
        folder = self.training_folder(arm, seed)
        return Step(f"seed{seed}_{arm}", command, needs, lambda: measure(folder), arm, seed)

    def _round1(self, seed: int) -> Step:
        command = [
            *("-m", "unseg.tools.self_train", "--config-file", FREESOLO, "--resume"),
            *("--masks", self.folder / "free_masks.json", "--dataset", self.train_set),
            *("--output", self.folder / f"seed{seed}/round1", "SELF_TRAINING.ROUNDS", "1"),
            *self._words(self.training, {"SEED": seed, "DATASETS.TEST": (TEST_SET,)}),
        ]
        return self._trained("round1", seed, command, "free_masks")

    def _masks(self, seed: int) -> Step:
        command = [
            *("-m", "unseg.tools.pseudo_masks", "--config-file", FREESOLO, "--resume"),
            *("--dataset", self.train_set, "--output", self.folder / f"seed{seed}/masks1.json"),
            *self._words({"MODEL.WEIGHTS": self._weights(seed)}, self.labelling),
        ]
        return Step(f"seed{seed}_masks1", command, [f"seed{seed}_round1"])

    def _pool(self, seed: int) -> Step:
        build = {"MODEL.EXEMPLAR.BUILD.PER_CATEGORY": PER_CATEGORY}
        command = [
            *("-m", "unseg.tools.build_exemplars", "--config-file", EXEMPLAR, "--resume"),
            *("--images", self.folder / "exemplars"),
            *("--output", self.folder / f"seed{seed}/pool.npz"),
            *self._words({"MODEL.WEIGHTS": self._weights(seed)}, build),
        ]
        return Step(f"seed{seed}_pool", command, ["exemplars", f"seed{seed}_round1"])

    def _round2(self, arm: str, seed: int) -> Step:
        config, needs = FREESOLO, [f"seed{seed}_masks1"]
        overrides = {
            "MODEL.WEIGHTS": self._weights(seed),
            "SEED": seed,
            "DATASETS.TRAIN": (f"{self.folder / f'seed{seed}/masks1.json'}@{self.train_set}",),
            "DATASETS.TEST": (TEST_SET,),
            "OUTPUT_DIR": self.training_folder(arm, seed),
        }
        if arm in ARMS:
            config, needs = EXEMPLAR, [*needs, f"seed{seed}_pool"]
            values = (self.folder / f"seed{seed}/pool.npz", *ARMS[arm])
            overrides |= zip((f"MODEL.EXEMPLAR.{k}" for k in EXEMPLAR_KEYS), values)
        program = config.parents[1] / "train_net.py"
        words = self._words(self.training, overrides)
        command = [program, "--config-file", config, "--resume", *words]
        return self._trained(arm, seed, command, *needs)


def labelling_overrides() -> dict[str, float]:
    """Which of round 1's masks round 2 learns from: those that self_train takes."""
    cfg = load_config(str(FREESOLO), ["MODEL.DEVICE", "cpu"])
    keys = ("SCORE_THRESHOLD", "MAX_MASKS_PER_IMAGE", "MAX_WIDTH")
    overrides = {f"DISCOVERY.{key}": cfg.SELF_TRAINING[key] for key in keys}
    threshold = max(cfg.MODEL.FREESOLO.UPDATE_THR, cfg.SELF_TRAINING.SCORE_THRESHOLD)
    return overrides | {"MODEL.FREESOLO.UPDATE_THR": threshold}


def count_errors(predictions: np.ndarray, objects: np.ndarray) -> dict[str, int]:
    """Of predictions (N, H, W) bool against objects (M, H, W) bool; see the top of this file."""
    found, true = torch.from_numpy(predictions), torch.from_numpy(objects)
    both = mask_iou(found, true, mode="inter").long()  # (N, M)
    area, true_area = found.sum((1, 2))[:, None], true.sum((1, 2))[None]
    # IoU >= 0.5 and inside >= 0.8 of the area, in whole numbers.
    matched = (2 * both >= area + true_area - both).any(1)
    inside = (5 * both >= 4 * area).any(1)
    return {
        "fragments": int((~matched & inside).sum()),
        "false positives": int((~matched & ~inside).sum()),
        "predictions": len(predictions),
    }


def measure(folder: Path) -> Mapping[str, float]:
    """The numbers of a finished training."""
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    kinds = (("mask", "segm"), ("box", "bbox"))
    numbers = {f"{kind} {m}": last[f"{task}/{m}"] for kind, task in kinds for m in METRICS}
    predicted = confident_masks(folder)
    scenes = DatasetCatalog.get(TEST_SET)
    for scene in scenes:
        truth = decode([a["segmentation"] for a in scene["annotations"]], scene)
        errors = count_errors(decode(predicted[scene["image_id"]], scene), truth)
        for name, count in errors.items():
            numbers[name] = numbers.get(name, 0) + count / len(scenes)
    return numbers


def confident_masks(folder: Path) -> Mapping[int, list[dict]]:
    """Encoded masks of score CONFIDENT and more that a training ended with, by image."""
    masks = defaultdict(list)
    for result in json.loads((folder / "inference/coco_instances_results.json").read_text()):
        if result["score"] >= CONFIDENT:
            masks[result["image_id"]].append(result["segmentation"])
    return masks


def decode(encoded: list[dict], scene: Mapping) -> np.ndarray:
    """Masks (N, H, W) bool of a scene."""
    if not encoded:
        return np.zeros((0, scene["height"], scene["width"]), dtype=bool)
    return mask_util.decode(encoded).transpose(2, 0, 1).astype(bool)


def draw_scenes(folders: Mapping[str, Path], path: Path) -> None:
    """The first scenes: image, ground truth, and the confident masks of trainings."""
    predicted = {title: confident_masks(folder) for title, folder in folders.items()}
    scenes = DatasetCatalog.get(TEST_SET)[:SCENES]
    titles = ["image", "ground truth", *folders]
    figure = Figure(figsize=(2 * len(titles), 2.1 * SCENES), dpi=160, layout="constrained")
    for scene, row in zip(scenes, figure.subplots(SCENES, len(titles))):
        image = read_image(scene["file_name"]).repeat(2, axis=0).repeat(2, axis=1)
        columns = [[], [a["segmentation"] for a in scene["annotations"]]]
        columns += [masks[scene["image_id"]] for masks in predicted.values()]
        for title, encoded, panel in zip(titles, columns, row):
            masks = decode(encoded, scene).repeat(2, axis=1).repeat(2, axis=2)
            panel.imshow(draw_instances(image, masks))
            panel.set_title(title if scene is scenes[0] else "", fontsize="small")
            panel.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__, ROOT / "output/exemplar_freesolo", ["freesolo", *ARMS])
    parser.add_argument("--iterations", type=int, default=320, help="of each round")
    parser.add_argument("--quick", action="store_true", help="does it all fit together?")
    parser.add_argument("--write-exemplars", type=Path, metavar="DIR", help="do nothing else")
    args = parser.parse_args()
    if args.quick:  # other defaults
        output = args.output.with_name("exemplar_freesolo_quick")
        arms = ["freesolo", "lambda1.3", "lambda1.3x5"]
        parser.set_defaults(iterations=2, seeds=[1], arms=arms, output=output)
        args = parser.parse_args()
    args.output = args.output.resolve()
    return args


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    if args.write_exemplars:
        write_exemplars(args.write_exemplars)
        return
    try:
        experiment = Experiment(args.output, {"iterations": args.iterations, "quick": args.quick})
        plan = Plan(args)
        experiment.run(plan.steps())
    except ExperimentError as error:
        sys.exit(f"\n{error}")
    say(f"\n{experiment.report(TITLES, 'freesolo')}\n\nAll in {args.output}")
    drawn = {"FreeSOLO": "freesolo", "Exemplar-FreeSOLO": "lambda1.3"}
    if {*drawn.values()} <= {*args.arms}:
        folders = {title: plan.training_folder(arm, args.seeds[0]) for title, arm in drawn.items()}
        draw_scenes(folders, args.output / "scenes.png")


if __name__ == "__main__":
    main()
