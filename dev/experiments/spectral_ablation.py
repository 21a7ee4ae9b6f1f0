"""The ablation of spectral segmentation on synthetic scenes with features of known quality.

    OMP_NUM_THREADS=1 python dev/experiments/spectral_ablation.py

Scenes of 2 to 5 objects, some touching or hidden in part; features with channels that carry signal,
that hardly vary and that are noise (spectral_features.py), C = 384. Three grids; fresh scenes for
each seed. The proportions of the features were chosen on seed 101, before the seeds reported here
were looked at.

Arms: all channels and inner products (the method that the paper starts from); + NCR; + NCR + DCR;
+ NCR + BoC; NCR + DCR + BoC. With BoC the background is either as published ("reference") or one
node ("quotient"); with inner products the two are the same. All of them are told how many objects
there are; "auto" is not. A second table compares affinities (NCR + DCR, quotient).

In the tables, means over scenes: `mIoU` of the objects on the patch grid, in percent; `F`, of the
foreground, in percent; `lost`, how many of the four eigenvectors vanish on the foreground; `K`, how
many segments there are (true K beside it). "bound": k-means that is given the true foreground, the
number of objects and the signal channels; more than that is not in the features of single patches.

Killed, the same command line goes on; processes with the same command line share the work.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from report import Results, write_report, write_whole
from runner import ROOT, Experiment, ExperimentError, Step, experiment_parser, say
from spectral_features import FeatureRecipe, PatchScene, patch_scenes

# isort: split
import numpy as np
import torch
import torch.nn.functional as F

from unseg.discovery.spectral import SpectralSettings, kmeans, segment
from unseg.discovery.spectral.graphs import AFFINITIES
from unseg.discovery.spectral.settings import ClusterSettings, DCRSettings, NCRSettings
from unseg.evaluation.matching import foreground_f_score, frame_miou

SCENES = {"30x30": 80, "30x53": 50, "45x80": 16}  # by grid, per seed
ARMS = {  # NCR, DCR, affinity, background
    "baseline": (False, False, "dot", "quotient"),
    "ncr": (True, False, "dot", "quotient"),
    "ncr_dcr": (True, True, "dot", "quotient"),
    "ncr_boc_reference": (True, False, "boc", "reference"),
    "ncr_boc": (True, False, "boc", "quotient"),
    "full_reference": (True, True, "boc", "reference"),
    "full": (True, True, "boc", "quotient"),
}
TITLES = {
    "baseline": "baseline (dot)",
    "ncr": "+ NCR (dot)",
    "ncr_dcr": "+ NCR + DCR (dot)",
    "ncr_boc_reference": "+ NCR + BoC, reference",
    "ncr_boc": "+ NCR + BoC, quotient",
    "full_reference": "+ NCR + DCR + BoC, reference",
    "full": "+ NCR + DCR + BoC, quotient",
    "auto": "the same, auto K",
    "bound": "bound",
}
AFFINITY_GRID = "30x30"
AFFINITY_TITLES = {f"affinity_{name}": name for name in AFFINITIES}


def arm_settings(arm: str) -> SpectralSettings:
    """The settings that an arm stands for."""
    if arm == "auto":
        return SpectralSettings()
    name = arm.removeprefix("affinity_")
    ncr, dcr, affinity, background = ARMS.get(arm, (True, True, name, "quotient"))
    return SpectralSettings(
        ncr=NCRSettings(enabled=ncr),
        dcr=DCRSettings(enabled=dcr),
        affinity=affinity,
        background=background,
        clusters=replace(ClusterSettings(), mode="oracle"),
        # The labels of the patches are scored as the clusters have them.
        split_components=False,
        min_area=0.0,
    )


def score_scene(scene: PatchScene, arm: str) -> dict[str, float]:
    """The numbers of one scene."""
    found = segment(torch.from_numpy(scene.features), arm_settings(arm), scene.num_objects)
    foreground = np.zeros_like(scene.labels)
    if found.foreground is not None:
        foreground = found.foreground.int().numpy()
    truth = (scene.labels > 0).astype(np.int32)
    maps = found.embedding
    return {
        "mIoU": 100 * frame_miou(found.labels.numpy(), scene.labels),
        "F": 100 * foreground_f_score(foreground, truth),
        # What is lost comes as a map of zeros.
        "lost": float("nan") if maps is None else float((maps == 0).flatten(1).all(1).sum()),
        "K": len(found.scores),
        "true K": scene.num_objects,
    }


def score_bound(scene: PatchScene) -> dict[str, float]:
    """k-means that is told all but which object a patch belongs to; see the top of this file."""
    inside = scene.labels > 0
    rows = torch.from_numpy(scene.features[scene.kinds == 0][:, inside]).t()
    labels = np.zeros_like(scene.labels)
    labels[inside] = kmeans(F.normalize(rows, dim=1).numpy(), scene.num_objects) + 1
    numbers = {"mIoU": 100 * frame_miou(labels, scene.labels), "F": 100.0}
    return numbers | {"K": labels.max().item(), "true K": scene.num_objects}


def score_scenes(grid: str, seed: int, count: int, arms: Sequence[str]) -> dict[str, list]:
    """arm -> numbers of each scene."""
    size = tuple(map(int, grid.split("x")))
    scores: dict[str, list] = {arm: [] for arm in arms}
    for scene in patch_scenes(size, seed, count, FeatureRecipe()):
        for arm in arms:
            scores[arm].append(score_bound(scene) if arm == "bound" else score_scene(scene, arm))
    return scores


def average(scores: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Means over scenes; of the scenes that have a number."""
    means = {}
    for metric in scores[0]:
        values = [one[metric] for one in scores if one[metric] == one[metric]]
        means[metric] = float(np.mean(values)) if values else None
    return means


def steps(args: argparse.Namespace) -> list[Step]:
    """One of each grid and seed, and the affinities."""
    made = []
    for grid in args.grids:
        kinds = {"": args.arms} | ({"_affinities": AFFINITY_TITLES} if args.affinities else {})
        for seed in dict.fromkeys(args.seeds):
            for kind, arms in kinds.items():
                if kind and grid != args.grids[0]:
                    continue
                name = f"{grid}{kind}_seed{seed}"
                command = [__file__, "--write", args.output / f"{name}.json", "--grids", grid]
                command += ["--seeds", str(seed), "--scenes", str(scene_count(args, grid))]
                made.append(Step(name, [*command, "--arms", *arms]))
    return made


def scene_count(args: argparse.Namespace, grid: str) -> int:
    """Scenes per seed on a grid."""
    return args.scenes or SCENES.get(grid, 20)


def tables(args: argparse.Namespace) -> dict[str, str]:
    """Write the report of each grid into a folder of its own; table by name."""
    kinds = [(grid, "", TITLES, "baseline") for grid in args.grids]
    if args.affinities:
        kinds.append((args.grids[0], "_affinities", AFFINITY_TITLES, "affinity_dot"))
    made = {}
    for grid, kind, titles, reference in kinds:
        results: Results = {}
        for seed in args.seeds:
            path = args.output / f"{grid}{kind}_seed{seed}.json"
            for arm, scores in json.loads(path.read_text()).items():
                results.setdefault(arm, {})[seed] = average(scores)
        folder = args.output / f"{grid}{kind}"
        folder.mkdir(exist_ok=True)
        settings = {"scenes": scene_count(args, grid), "recipe": asdict(FeatureRecipe())}
        made[folder.name] = write_report(folder, results, settings, titles, reference)
    return made


def parse_arguments() -> argparse.Namespace:
    arms = [*TITLES, *AFFINITY_TITLES]
    parser = experiment_parser(__doc__, ROOT / "output/spectral_ablation", arms)
    parser.set_defaults(arms=list(TITLES))
    parser.add_argument("--grids", nargs="+", default=list(SCENES), help="rows x columns, 30x53")
    parser.add_argument("--scenes", type=int, help="per seed, instead of " + str(SCENES))
    parser.add_argument(
        "--affinities",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare affinities, on the first grid",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="do one step, nothing else")
    args = parser.parse_args()
    args.output = args.output.resolve()
    return args


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    if args.write:
        torch.set_num_threads(1)
        count = scene_count(args, args.grids[0])
        scores = score_scenes(args.grids[0], args.seeds[0], count, args.arms)
        write_whole(args.write, json.dumps(scores))
        return
    try:
        settings = {"scenes": args.scenes or SCENES, "recipe": asdict(FeatureRecipe())}
        experiment = Experiment(args.output, settings)
        experiment.run(steps(args))
    except ExperimentError as error:
        sys.exit(f"\n{error}")
    for name, table in tables(args).items():
        say(f"\n## {name}\n\n{table}")


if __name__ == "__main__":
    main()
