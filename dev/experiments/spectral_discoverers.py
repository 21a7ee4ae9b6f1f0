"""Class-agnostic AP of training-free discoverers on the same hand-made features.

    export DETECTRON2_DATASETS=DIR        for coco: its val2017, or a part of it
    OMP_NUM_THREADS=1 python dev/experiments/spectral_discoverers.py

DeepSpectral, FreeMask (of FreeSOLO), TokenCut and MaskCut (without its CRF), each as its config for
the filter bank has it, write pseudo-masks (unseg.tools.pseudo_masks), and these are measured
(unseg.tools.evaluate_masks), in percent. Nothing is trained and nothing is random, so there is one
number of each.

* scenes: 200 synthetic scenes, on which no setting was chosen.
* coco: photographs. TokenCut's and MaskCut's configs are for the synthetic scenes: here they get
  the features and the image size that the other two have on photographs, and their thresholds are
  not chosen anew. DeepSpectral is there with three settings: the filter bank's own; the position
  weighs less (this was chosen on 40 images of train2017); NCR off besides (likewise). Features
  without weights find few of the objects that COCO annotates, whatever is done with them: this is
  no comparison of the methods on the features they are meant for.

Killed, the same command line goes on; processes with the same command line share the work.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from runner import ROOT, Experiment, ExperimentError, Step, experiment_parser, say

SPECTRAL = ROOT / "projects/DeepSpectral/configs"
FREESOLO = ROOT / "projects/FreeSOLO/configs"
DATA_SETS = {"scenes": "unseg_synthetic_val_fresh", "coco": "unseg_coco_2017_val_cls_agnostic"}
# Weight of the position among the features: the filter bank's own, and a smaller one.
FAR = {"MODEL.FILTER_BANK.POSITION_WEIGHT": 1.5}
NEAR = {"MODEL.FILTER_BANK.POSITION_WEIGHT": 0.3}
NCR_OFF = {"MODEL.DEEP_SPECTRAL.NCR.ENABLED": False}
# The filter bank as it is by default, for photographs.
PHOTOGRAPHS = {
    "MODEL.FILTER_BANK.TEXTURE_WEIGHT": 0.3,
    "MODEL.FILTER_BANK.POSITION_WEIGHT": 1.5,
    "MODEL.FILTER_BANK.BANDWIDTH": 1.4,
    "INPUT.MIN_SIZE_TEST": 320,
    "INPUT.MAX_SIZE_TEST": 640,
}
# Config and overrides by data; and what to call the arm.
ARMS: dict[str, dict[str, tuple[Path, dict[str, object]]]] = {
    "free_mask": {
        "scenes": (FREESOLO / "free_masks_tiny.yaml", {}),
        "coco": (FREESOLO / "free_masks_filter_bank.yaml", {}),
    },
    "token_cut": {
        "scenes": (SPECTRAL / "tokencut_filter_bank.yaml", {}),
        "coco": (SPECTRAL / "tokencut_filter_bank.yaml", PHOTOGRAPHS),
    },
    "mask_cut": {
        "scenes": (SPECTRAL / "maskcut_filter_bank.yaml", {}),
        "coco": (SPECTRAL / "maskcut_filter_bank.yaml", PHOTOGRAPHS),
    },
    "deep_spectral": {
        "scenes": (SPECTRAL / "deep_spectral_tiny.yaml", {}),
        "coco": (SPECTRAL / "deep_spectral_filter_bank.yaml", FAR),
    },
    "deep_spectral_near": {"coco": (SPECTRAL / "deep_spectral_filter_bank.yaml", NEAR)},
    "no_ncr": {
        "scenes": (SPECTRAL / "deep_spectral_tiny.yaml", NCR_OFF),
        "coco": (SPECTRAL / "deep_spectral_filter_bank.yaml", NEAR | NCR_OFF),
    },
}
TITLES = {
    "free_mask": "FreeMask",
    "token_cut": "TokenCut",
    "mask_cut": "MaskCut, no CRF",
    "deep_spectral": "DeepSpectral",
    "deep_spectral_near": "DeepSpectral, position 0.3",
    "no_ncr": "the same, NCR off",
}
METRICS = {"mask": ("segm", ("AP50", "AP", "AR@100")), "box": ("bbox", ("AP50",))}


def steps(folder: Path, data: str, data_set: str, arms: list[str], words: list[str]) -> list[Step]:
    """Masks and their numbers, by arm.

    Args:
        folder: for the files.
        data: a key of DATA_SETS, which decides on configs.
        data_set: registered name, or x.json@DIR.
        arms: keys of ARMS.
        words: KEY VALUE ... for all configs.
    """
    made = []
    for arm in (arm for arm in arms if data in ARMS[arm]):
        config, overrides = ARMS[arm][data]
        masks, numbers = folder / f"{arm}.json", folder / f"{arm}_numbers.json"
        own = [str(word) for item in overrides.items() for word in item]
        find = [
            *("-m", "unseg.tools.pseudo_masks", "--config-file", config, "--resume"),
            *("--dataset", data_set, "--output", masks, *own, *words),
        ]
        evaluate = [
            *("-m", "unseg.tools.evaluate_masks", masks, "--dataset", data_set),
            *("--output", numbers),
        ]
        made.append(Step(f"{arm}_masks", find))
        measure = lambda masks=masks, numbers=numbers: read_numbers(masks, numbers)  # noqa: E731
        made.append(Step(arm, evaluate, [f"{arm}_masks"], measure, arm, 0))
    return made


def read_numbers(masks: Path, numbers: Path) -> Mapping[str, float]:
    """What a step has left, and the number of masks per image."""
    measured = json.loads(numbers.read_text())
    found = {
        f"{kind} {name}": measured[task][name]
        for kind, (task, names) in METRICS.items()
        for name in names
    }
    content = json.loads(masks.read_text())
    return found | {"masks/image": len(content["annotations"]) / len(content["images"])}


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__, ROOT / "output/spectral_discoverers", list(ARMS))
    parser.set_defaults(seeds=[])
    parser.add_argument("--data", nargs="+", choices=list(DATA_SETS), default=list(DATA_SETS))
    parser.add_argument("--scenes", metavar="NAME", help="another set of scenes")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE", help="for all configs")
    args = parser.parse_args()
    args.output = args.output.resolve()
    return args


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    report, failures = [], []
    for data in args.data:
        data_set = args.scenes if data == "scenes" and args.scenes else DATA_SETS[data]
        folder = args.output / data
        try:
            experiment = Experiment(folder, {"data set": data_set, "overrides": args.words})
            try:
                experiment.run(steps(folder, data, data_set, args.arms, args.words))
            finally:
                table = experiment.report(TITLES, "free_mask")
                report.append(f"\n## {data}: {data_set}\n\n{table}")
        except ExperimentError as error:
            failures.append(str(error))
    say("\n".join(report))
    if failures:
        sys.exit("\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
