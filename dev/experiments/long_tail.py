"""Long-tail discovery on synthetic scenes: what each loss and the geometry are worth.

    OMP_NUM_THREADS=1 python dev/experiments/long_tail.py [KEY VALUE ...]

The scenes have 24 categories of objects, whose frequency falls steeply (Zipf, 1.2), and 12 classes
of parts. Per seed a class-agnostic Mask R-CNN learns masks of objects and parts without their
classes (proposals_tiny.yaml), and every head is trained on it, frozen and without any labels
(long_tail_tiny.yaml). Then its detections on fresh scenes are clustered, K = 54.

Arms:
* untrained head: the detector's features, projected at random.
* full: three losses, Poincaré ball, 64 dimensions.
* w/o mask, w/o object, w/o hierarchical: without that loss.
* Poincaré and Euclidean with 2, 8 and 64 dimensions. Euclidean distances and norms in the losses,
  and k-means instead of hyperbolic k-means.
* free masks: no labels at all. The Mask R-CNN has learned FreeSOLO's free masks of the training
  scenes instead, which hold no parts; its head untrained and full. Its detections are others: their
  numbers are of fewer matches.

What is measured: long_tail_measures.py. Tables, one folder each: clusters (of the detections that
match an annotation), lvis (named by majority on one half of the images, scored on the other), and
embedding (of the annotations themselves).

Killed, the same command line goes on; processes with the same command line share the work.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from report import Results, write_report
from runner import ROOT, Step, experiment_parser, run_and_report

MEASURE = Path(__file__).with_name("long_tail_measures.py")
PROJECT = ROOT / "projects/LongTail"
DETECTOR = PROJECT / "configs/proposals_tiny.yaml"
HEAD = PROJECT / "configs/long_tail_tiny.yaml"
FREE_MASKS = ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml"
TRAIN_SET, TEST_SET = "unseg_synthetic_train_lvis_parts", "unseg_synthetic_val_lvis_fresh_parts"
KEY = "MODEL.HIERARCHICAL_EMBEDDING"


@dataclass(frozen=True)
class Arm:
    """A row of the tables.

    Attributes:
        title: its name there.
        overrides: of HEAD.
        detector: what its detector has learned: "truth" or "free" masks.
        trained: whether the head is.
    """

    title: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    detector: str = "truth"
    trained: bool = True


def _without(loss: str) -> Arm:
    title = {"MASK": "mask", "OBJECT": "object", "HIER": "hierarchical"}[loss]
    return Arm(f"w/o {title}", {f"{KEY}.WEIGHT_{loss}": 0.0})


def _space(geometry: str, dim: int) -> Arm:
    title = {"poincare": "Poincaré", "euclidean": "Euclidean"}[geometry]
    return Arm(f"{title}, D = {dim}", {f"{KEY}.GEOMETRY": geometry, f"{KEY}.EMBED_DIM": dim})


ARMS = {
    "untrained": Arm("untrained head", trained=False),
    "full": Arm("full"),
    "without_mask": _without("MASK"),
    "without_object": _without("OBJECT"),
    "without_hierarchical": _without("HIER"),
    "euclidean_64": _space("euclidean", 64),
    "poincare_8": _space("poincare", 8),
    "euclidean_8": _space("euclidean", 8),
    "poincare_2": _space("poincare", 2),
    "euclidean_2": _space("euclidean", 2),
    "free_untrained": Arm("free masks, untrained head", detector="free", trained=False),
    "free": Arm("free masks, full", detector="free"),
}
# Columns.
TABLES = {
    "clusters": (
        *("NMI", "ACC", "purity", "recall", "recall f", "recall c", "recall r"),
        *("k-means NMI", "matched"),
    ),
    "lvis": ("AP", "AP50", "APr", "APc", "APf", "named", "dropped"),
    "embedding": ("gt NMI", "gt kNN", "wholes inside", "fg inside", "same instance"),
}


class Plan:
    """The steps, in the order in which they are begun."""

    def __init__(
        self, folder: Path, train_set: str, test_set: str, arms: Sequence[str], words: Sequence[str]
    ):
        """
        Args:
            folder: for the files.
            train_set, test_set: registered names, of the style "parts".
            arms: keys of ARMS.
            words: KEY VALUE ... for all configs.
        """
        self.folder, self.train_set, self.test_set = folder, train_set, test_set
        self.arms = [name for name in ARMS if name in arms]
        self.always = list(words)

    def steps(self, seeds: Sequence[int]) -> list[Step]:
        """What all seeds share, then seed by seed, detectors first."""
        steps, kinds = [], dict.fromkeys(ARMS[arm].detector for arm in self.arms)
        if "free" in kinds:
            command = [
                *("-m", "unseg.tools.pseudo_masks", "--config-file", FREE_MASKS, "--resume"),
                *("--dataset", self.train_set, "--output", self.folder / "free_masks.json"),
            ]
            steps.append(Step("free_masks", [*command, *self.always]))
        for seed in dict.fromkeys(seeds):
            steps += [self._detector(kind, seed) for kind in kinds]
            for arm in self.arms:
                steps += self._head(arm, seed)
        return steps

    def _train(self, name: str, config: Path, settings: Mapping[str, object], needs: list) -> Step:
        words = [str(word) for item in settings.items() for word in item]
        command = [PROJECT / "train_net.py", "--config-file", config, "--resume", *words]
        return Step(name, [*command, *self.always], needs)

    def _weights(self, name: str, seed: int) -> Path:
        return self.folder / f"seed{seed}/{name}/model_final.pth"

    def _detector(self, kind: str, seed: int) -> Step:
        name, needs = f"detector_{kind}", []
        settings = {
            "SEED": seed,
            "OUTPUT_DIR": self._weights(name, seed).parent,
            "DATASETS.TRAIN": (self.train_set,),
            "DATASETS.TEST": (),
        }
        if kind == "free":
            settings["DATASETS.TRAIN"] = (f"{self.folder}/free_masks.json@{self.train_set}",)
            needs = ["free_masks"]
        return self._train(f"seed{seed}_{name}", DETECTOR, settings, needs)

    def _head(self, arm: str, seed: int) -> list[Step]:
        """Training and measuring."""
        one, steps, source = ARMS[arm], [], f"detector_{ARMS[arm].detector}"
        weights, needs = self._weights(source, seed), [f"seed{seed}_{source}"]
        if one.trained:
            training = {
                "SEED": seed,
                "MODEL.WEIGHTS": weights,
                "OUTPUT_DIR": self._weights(arm, seed).parent,
                "DATASETS.TRAIN": (self.train_set,),
                "DATASETS.TEST": (),
            }
            settings = {**one.overrides, **training}
            steps.append(self._train(f"seed{seed}_{arm}_training", HEAD, settings, needs))
            weights, needs = self._weights(arm, seed), [f"seed{seed}_{arm}_training"]
        numbers = self.folder / f"seed{seed}_{arm}.json"
        settings = {**one.overrides, "SEED": seed, "MODEL.WEIGHTS": weights}
        command = [
            *(MEASURE, "--config-file", HEAD, "--data", self.test_set, "--write", numbers),
            *(str(word) for item in settings.items() for word in item),
            *self.always,
        ]
        measured = Step(
            f"seed{seed}_{arm}", command, needs, lambda: read_numbers(numbers), arm, seed
        )
        return [*steps, measured]


def read_numbers(path: Path) -> dict[str, float]:
    """What a measurement has left."""
    content = json.loads(path.read_text())
    return {key: float("nan") if value is None else value for key, value in content.items()}


def tables(folder: Path, results: Results, settings: Mapping[str, object]) -> dict[str, str]:
    """Write the report of each topic into a folder of its own; tables by name."""
    titles, made = {name: arm.title for name, arm in ARMS.items()}, {}
    for name, columns in TABLES.items():
        part = {
            arm: {seed: {key: numbers[key] for key in columns} for seed, numbers in seeds.items()}
            for arm, seeds in results.items()
        }
        (folder / name).mkdir(exist_ok=True)
        made[name] = write_report(folder / name, part, settings, titles, "full")
    return made


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__, ROOT / "output/long_tail", list(ARMS))
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
