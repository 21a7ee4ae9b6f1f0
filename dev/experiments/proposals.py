"""Proposal networks against each other and against blind windows, on scenes of touching objects.

    OMP_NUM_THREADS=1 python dev/experiments/proposals.py [KEY VALUE ...]

Every network starts from random weights and is trained by the tiny config of its project, on 1500
scenes whose groups are one or two objects of one category and look; the two of a pair touch.
Settings were chosen on unseg_synthetic_val_touching; reported are fresh scenes.

Arms:
* sliding windows: discs of the canonical size in the windows of DeepMask's pyramid, all positions
  and scales in random order, up to 1000 per image.
* DeepMask: the released head (mask and score share one vector); the paper's (two branches, low
  rank); and Full (no low rank). SharpMask refines the first one, with its weights of the same seed:
  `training s` is the refinement's alone.
* InstanceFCN with k = 1, 3, 5 and 7; k = 1 is a plain FCN cut by windows.
* InstanceFCN, crop training: patches of 84 pixels around a window of 60, as the paper's ablation
  with its 224 around 168. Equal to k = 5 are the network, the number of steps, the learning rate,
  the rule for positives and negatives, and about the pixels that a step goes through (16 patches:
  113,000; 4 images: 119,000). Unequal are the windows of a step (one per patch, 16, against 64 per
  image, 256), and that a patch is resized to its object instead of being one of three sizes.
* free masks: those of projects/FreeSOLO's discoverer (no labels, no weights) as proposals, as many
  as it finds; and networks trained on its masks of the same training scenes instead of labels.

Tables, one folder each: recall, in percent, of masks and (box AR@100) of their boxes, IoU
.50:.05:.95; touching, where all objects are ignored that touch no other one (touching: they share a
side of a pixel), and for InstanceFCN what the masks are like in all windows that the ground truth
calls positive and whose object touches another one, without any selection by score: mean IoU with
the object's cells, in percent, and `foreign`, the percentage of the other objects' cells in the
window that the mask takes (mean over windows that have such cells); cost: parameters in millions,
seconds of training and milliseconds per image of 160 x 160 (median), one thread of a CPU that other
work may share: noisy.

Killed, the same command line goes on; processes with the same command line share the work.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from report import Results, write_report
from runner import ROOT, Step, experiment_parser, run_and_report

MEASURE = Path(__file__).with_name("proposal_measures.py")
DEEPMASK = ROOT / "projects/DeepMask/configs/deepmask_tiny.yaml"
SHARPMASK = ROOT / "projects/DeepMask/configs/sharpmask_tiny.yaml"
INSTANCE_FCN = ROOT / "projects/InstanceFCN/configs/instance_fcn_tiny.yaml"
FREE_MASKS = ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml"
TRAIN_SET, TEST_SET = "unseg_synthetic_train_touching", "unseg_synthetic_val_touching_fresh"
# Windows of 15 cells of 4 pixels and 3 more cells on each side; objects of 60 / 1.3125 pixels. The
# positives' jitter and the negatives' distance are those of InstanceFCN for such objects, scales
# those of its pyramid.
CROP = {
    "MODEL.INSTANCE_FCN.TRAIN_ON": "crop",
    "INPUT.MAPPER": "DeepMaskPatchMapper",
    "MODEL.DEEPMASK.INPUT_SIZE": 60,
    "MODEL.DEEPMASK.CONTEXT": 24,
    "MODEL.DEEPMASK.OBJECT_SIZE": 46,
    "MODEL.DEEPMASK.GT_SIZE": 15,
    "MODEL.DEEPMASK.DATA.PATCHES_PER_IMAGE": 4,
    "MODEL.DEEPMASK.DATA.JITTER_SHIFT": 5.75,
    "MODEL.DEEPMASK.DATA.JITTER_SCALE": 0.3,
    "MODEL.DEEPMASK.DATA.NEG_SHIFT": 11.5,
    "MODEL.DEEPMASK.DATA.MIN_AREA": 0,
    "MODEL.DEEPMASK.DATA.MIN_SIDE": 0,
    "MODEL.DEEPMASK.TEST.SCALES": (-0.5, 0.0, 0.5),
}


@dataclass(frozen=True)
class Arm:
    """A row of the tables.

    Attributes:
        title: its name there.
        config: of the network; of the other arms, where the windows or masks are from.
        overrides: of the config.
        start: the arm whose weights training starts from.
        labels: "truth", or "free": trained on free masks; "none": not trained.
    """

    title: str
    config: Path
    overrides: Mapping[str, object] = field(default_factory=dict)
    start: str | None = None
    labels: str = "truth"


def _fcn(k: int) -> Arm:
    return Arm(f"InstanceFCN, k = {k}", INSTANCE_FCN, {"MODEL.INSTANCE_FCN.K": k})


K5 = {"MODEL.INSTANCE_FCN.K": 5}
ARMS = {
    "sliding": Arm("sliding windows", DEEPMASK, labels="none"),
    "deepmask": Arm("DeepMask", DEEPMASK),
    "deepmask_paper": Arm("DeepMask, paper head", DEEPMASK, {"MODEL.DEEPMASK.HEAD": "paper"}),
    "deepmask_full": Arm("DeepMask Full", DEEPMASK, {"MODEL.DEEPMASK.HEAD": "full"}),
    "sharpmask": Arm("SharpMask", SHARPMASK, start="deepmask"),
    "instance_fcn_k1": _fcn(1),
    "instance_fcn_k3": _fcn(3),
    "instance_fcn_k5": _fcn(5),
    "instance_fcn_k7": _fcn(7),
    "instance_fcn_crop": Arm("InstanceFCN, k = 5, crop training", INSTANCE_FCN, K5 | CROP),
    "free_masks": Arm("free masks", FREE_MASKS, labels="none"),
    "deepmask_free": Arm("DeepMask on free masks", DEEPMASK, labels="free"),
    "instance_fcn_free": Arm("InstanceFCN, k = 5, on free masks", INSTANCE_FCN, K5, labels="free"),
}
# Columns, and the arm that the others are compared with.
TABLES = {
    "recall": (("AR@1", "AR@10", "AR@100", "AR@1000", "AUC", "box AR@100"), "deepmask"),
    "touching": (
        ("touching AR@10", "touching AR@100", "window IoU", "foreign"),
        "instance_fcn_k1",
    ),
    "cost": (("M parameters", "training s", "ms/image"), "deepmask"),
}


class Plan:
    """The steps, in the order in which they are begun."""

    def __init__(
        self, folder: Path, train_set: str, test_set: str, arms: Sequence[str], words: Sequence[str]
    ):
        """
        Args:
            folder: for the files.
            train_set, test_set: registered names.
            arms: keys of ARMS; what they need is added.
            words: KEY VALUE ... for all configs.
        """
        self.folder, self.train_set, self.test_set = folder, train_set, test_set
        needed = {arm.start for name, arm in ARMS.items() if name in arms}
        self.arms = [name for name in ARMS if name in {*arms} | needed]
        self.always = list(words)

    def steps(self, seeds: Sequence[int]) -> list[Step]:
        """What all seeds share, then seed by seed."""
        steps = []
        if any(ARMS[arm].labels == "free" for arm in self.arms):
            steps.append(self._free_masks("free_masks_train", self.train_set))
        if "free_masks" in self.arms:
            steps.append(self._free_masks("free_masks_test", self.test_set))
            masks = self.folder / "free_masks_test.json"
            steps.append(self._measure("free_masks", 0, ["--masks", masks], ["free_masks_test"]))
        for seed in dict.fromkeys(seeds):
            for arm in self.arms:
                if arm == "sliding":
                    steps.append(self._measure(arm, seed, ["--sliding", seed]))
                elif ARMS[arm].labels != "none":
                    steps += self._network(arm, seed)
        return steps

    def _words(self, *overrides: Mapping[str, object]) -> list[str]:
        """KEY VALUE ..."""
        return [str(word) for part in overrides for item in part.items() for word in item]

    def _free_masks(self, name: str, data_set: str) -> Step:
        command = [
            *("-m", "unseg.tools.pseudo_masks", "--config-file", FREE_MASKS, "--resume"),
            *("--dataset", data_set, "--output", self.folder / f"{name}.json", *self.always),
        ]
        return Step(name, command)

    def _weights(self, arm: str, seed: int) -> Path:
        return self.folder / f"seed{seed}/{arm}/model_final.pth"

    def _network(self, arm: str, seed: int) -> list[Step]:
        """Training and measuring."""
        one, weights, needs = ARMS[arm], self._weights(arm, seed), []
        training = {
            "SEED": seed,
            "OUTPUT_DIR": weights.parent,
            "DATASETS.TRAIN": (self.train_set,),
            "DATASETS.TEST": (),
        }
        if one.start is not None:
            training["MODEL.WEIGHTS"] = self._weights(one.start, seed)
            needs.append(f"seed{seed}_{one.start}_training")
        if one.labels == "free":
            masks = self.folder / "free_masks_train.json"
            training["DATASETS.TRAIN"] = (f"{masks}@{self.train_set}",)
            needs.append("free_masks_train")
        name = f"seed{seed}_{arm}_training"
        command = [
            *(one.config.parents[1] / "train_net.py", "--config-file", one.config, "--resume"),
            *(*self._words(one.overrides, training), *self.always),
        ]
        measured = self._measure(arm, seed, [], [name], {"MODEL.WEIGHTS": weights})
        return [Step(name, command, needs), measured]

    def _measure(
        self,
        arm: str,
        seed: int,
        source: Sequence[object],
        needs: Sequence[str] = (),
        overrides: Mapping[str, object] | None = None,
    ) -> Step:
        one, name = ARMS[arm], f"seed{seed}_{arm}"
        numbers = self.folder / f"{name}.json"
        command = [
            *(MEASURE, "--config-file", one.config, "--data", self.test_set, "--write", numbers),
            *(*map(str, source), *self._words(one.overrides, overrides or {}), *self.always),
        ]
        training = self._weights(arm, seed).parent if overrides else None
        return Step(name, command, needs, lambda: read_numbers(numbers, training), arm, seed)


def read_numbers(path: Path, training: Path | None) -> dict[str, float]:
    """What a measurement has left, and the seconds that the training in a folder took."""
    content = json.loads(path.read_text())
    numbers = {k: float("nan") if v is None else v for k, v in content.items()}
    return numbers if training is None else numbers | {"training s": training_seconds(training)}


def training_seconds(folder: Path) -> float:
    """Iterations times the median time of one, without start and pauses; NaN if not known.

    Args:
        folder: with a metrics.json, in which a resumed training has written some lines twice.
    """
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    times = [line["time"] for line in lines if "time" in line]
    iterations = 1 + max(line["iteration"] for line in lines)
    return iterations * statistics.median(times) if times else float("nan")


def tables(folder: Path, results: Results, settings: Mapping[str, object]) -> dict[str, str]:
    """Write the report of each topic into a folder of its own; tables by name."""
    titles = {name: arm.title for name, arm in ARMS.items()}
    made = {}
    for name, (columns, reference) in TABLES.items():
        part: Results = {}
        for arm, seeds in results.items():
            for seed, numbers in seeds.items():
                # In the order of the table: a column that one arm lacks must not move.
                found = {key: numbers[key] for key in columns if key in numbers}
                if found:
                    part.setdefault(arm, {})[seed] = found
        (folder / name).mkdir(exist_ok=True)
        made[name] = write_report(folder / name, part, settings, titles, reference)
    return made


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__, ROOT / "output/proposals", list(ARMS))
    parser.add_argument("--data", default=TEST_SET, metavar="NAME", help="measure on it")
    parser.add_argument("--train", default=TRAIN_SET, metavar="NAME", help="train on it")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE", help="for all configs")
    args = parser.parse_args()
    args.output = args.output.resolve()
    return args


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    settings = {"training set": args.train, "data set": args.data, "overrides": args.words}
    plan = Plan(args.output, args.train, args.data, args.arms, args.words)
    run_and_report(args.output, settings, plan.steps(args.seeds), tables)


if __name__ == "__main__":
    main()
