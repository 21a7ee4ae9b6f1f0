"""The demo behind dev/demo.sh: images to masks to trained models, with nothing downloaded.

1. Free masks on photographs that ship inside scikit-image and scikit-learn.
2. Free masks on synthetic training scenes. A small FreeSOLO learns them, and a second one the masks
   of the first; beside them a small Mask R-CNN. All are measured on fresh validation scenes, and on
   scenes that show nothing but categories which no training scene has.

Every step is one of the commands a user would type; they are printed. Results: a table, and
pictures in <output>/index.html.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from demo_page import draw_photographs, draw_scenes, write_page

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "projects/FreeSOLO/configs"
TRAIN_NET = ROOT / "projects/FreeSOLO/train_net.py"
# Tuned on unseg_synthetic_val, reported on scenes that no choice was made on. The training scenes
# lack the categories that all objects of HELDOUT_SET have.
TRAIN_SET, VAL_SET = "unseg_synthetic_train_heldout", "unseg_synthetic_val_fresh"
HELDOUT_SET = "unseg_synthetic_val_heldout_fresh"
# Of each training; what ten minutes on two slow cores allow. FreeSOLO gains from more.
ITERATIONS, MASK_RCNN_ITERATIONS = 320, 90
PHOTOGRAPHS = {
    "skimage.data": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "motorcycle_left.png",
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
METRICS = ("AP50", "AP", "AR@100")
MARKER = ".unseg-demo"  # in the output folder: everything there is ours, to be deleted
Metrics = dict[str, dict[str, float]]  # task ("segm", "bbox") -> metric -> percent


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def make_output_folder(folder: Path) -> None:
    """An empty folder with our marker, in place of an earlier demo's folder if there is one.

    Raises:
        SystemExit: there is something there that no demo has written; nothing is deleted.
    """
    if folder.exists() and not folder.is_dir():
        sys.exit(f"--output {folder} is a file: name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            sys.exit(
                f"--output {folder} holds files, and no {MARKER} that says a demo wrote them: "
                "delete the folder yourself, or name another"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


class Commands:
    """Runs Python commands, shown as a user would type them; their output goes to logs."""

    def __init__(self, logs: Path):
        self.logs = logs
        self.count = 0
        logs.mkdir(parents=True)

    def __call__(self, title: str, *arguments: str | Path) -> None:
        """Run one command; its failure ends the demo."""
        words = [str(a).replace(f"{ROOT}/", "") for a in arguments]
        say(f"\n== {title}\n$ python {shlex.join(words)}")
        self.count += 1
        log = self.logs / f"{self.count:02d}.log"
        start = time.monotonic()
        with open(log, "w") as file:
            status = subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
            ).returncode
        if status:
            say(log.read_text()[-4000:])
            sys.exit(f"the command failed; its whole output is in {log}")
        say(f"   {time.monotonic() - start:.0f} s, output in {log}")


def collect_photographs(folder: Path) -> None:
    """Copy the sample photographs out of the installed packages."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            source = files(package) / name
            if source.is_file():
                (folder / name).write_bytes(source.read_bytes())


def find_masks(run: Commands, source: str, where: str | Path, config: str, file: Path) -> None:
    """Free masks of a folder or data set."""
    run(
        f"free masks of {Path(where).name}",
        *("-m", "unseg.tools.pseudo_masks", "--config-file", CONFIGS / config),
        *(source, where, "--output", file),
    )


def measure_masks(run: Commands, dataset: str, output: Path) -> tuple[Path, Metrics]:
    """Free masks of validation scenes: their file and their metrics."""
    masks, metrics = output / f"{dataset}.json", output / f"{dataset}_metrics.json"
    find_masks(run, "--dataset", dataset, "free_masks_tiny.yaml", masks)
    run(
        "measure the free masks themselves",
        *("-m", "unseg.tools.evaluate_masks", masks, "--dataset", dataset, "--output", metrics),
    )
    return masks, json.loads(metrics.read_text())


def train_freesolo(
    run: Commands, masks: Path, output: Path, seed: int, iterations: int
) -> list[dict[str, Metrics]]:
    """Self-train the tiny FreeSOLO on free masks; each round's metrics by data set."""
    run(
        f"train FreeSOLO on the free masks, and another one on its masks (seed {seed})",
        *("-m", "unseg.tools.self_train", "--config-file", CONFIGS / "freesolo_tiny.yaml"),
        *("--masks", masks, "--dataset", TRAIN_SET, "--output", output),
        *("DATASETS.TEST", f"('{VAL_SET}','{HELDOUT_SET}')"),
        *("SOLVER.MAX_ITER", str(iterations), "SEED", str(seed)),
    )
    return [one["metrics"] for one in json.loads((output / "results.json").read_text())["rounds"]]


def train_mask_rcnn(
    run: Commands, masks: Path, output: Path, seed: int, iterations: int
) -> Metrics:
    """Train the tiny Mask R-CNN on pseudo-masks; the metrics of its evaluation."""
    run(
        f"train a Mask R-CNN on the free masks (seed {seed}) and evaluate it",
        *(TRAIN_NET, "--config-file", CONFIGS / "pseudo_mask_rcnn_tiny.yaml"),
        *("DATASETS.TRAIN", f"('{masks}@{TRAIN_SET}',)", "DATASETS.TEST", f"('{VAL_SET}',)"),
        # Half batches: few large steps would end within the warm-up.
        *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", str(iterations)),
        *("SEED", str(seed), "OUTPUT_DIR", output),
    )
    last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    return {
        task: {metric: last[f"{task}/{metric}"] for metric in METRICS} for task in ("segm", "bbox")
    }


def make_table(rows: dict[str, Metrics]) -> str:
    """A Markdown table: one row per stage, mask and box metrics."""
    names = [f"{kind} {metric}" for kind in ("mask", "box") for metric in METRICS]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for title, numbers in rows.items():
        values = [numbers[task][metric] for task in ("segm", "bbox") for metric in METRICS]
        lines.append(f"| {title} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def median(results: list[Metrics]) -> Metrics:
    """The median of each number."""
    return {
        task: {m: statistics.median(r[task][m] for r in results) for m in METRICS}
        for task in ("segm", "bbox")
    }


def compare(rows: dict[str, Metrics]) -> str:
    """A sentence on how the mask AP50 grows from the free masks to the rounds."""
    free, *rounds = (row["segm"]["AP50"] for row in rows.values())
    if not free:
        return "The free masks have a mask AP50 of 0: there is nothing to compare."
    times = " and ".join(f"{value / free:.2f}" for value in rounds)
    return f"FreeSOLO's rounds reach {times} times the mask AP50 of the free masks."


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output/demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one training each")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="of each round of FreeSOLO"
    )
    parser.add_argument("--quick", action="store_true", help="half the iterations of all trainings")
    args = parser.parse_args()
    start = time.monotonic()
    output = args.output.resolve()
    make_output_folder(output)
    run = Commands(output / "logs")
    iterations, others = (
        n // 2 if args.quick else n for n in (args.iterations, MASK_RCNN_ITERATIONS)
    )

    photographs, photo_masks = output / "photographs", output / "photographs.json"
    collect_photographs(photographs)
    find_masks(run, "--images", photographs, "free_masks_filter_bank.yaml", photo_masks)

    train_masks = output / "train.json"
    find_masks(run, "--dataset", TRAIN_SET, "free_masks_tiny.yaml", train_masks)
    val_masks, free = measure_masks(run, VAL_SET, output)
    _, free_heldout = measure_masks(run, HELDOUT_SET, output)
    folders = [output / f"seed{seed}" for seed in args.seeds]
    rounds = [
        train_freesolo(run, train_masks, folder / "freesolo", seed, iterations)
        for folder, seed in zip(folders, args.seeds)
    ]
    detectors = [
        train_mask_rcnn(run, train_masks, folder / "mask_rcnn", seed, others)
        for folder, seed in zip(folders, args.seeds)
    ]

    first, second = ([one[number] for one in rounds] for number in (0, 1))
    rows = {
        "free masks": free,
        "FreeSOLO, round 1": median([one[VAL_SET] for one in first]),
        "FreeSOLO, round 2": median([one[VAL_SET] for one in second]),
    }
    comparison = compare(rows)
    rows["Mask R-CNN on the free masks"] = median(detectors)
    rows["held-out categories: free masks"] = free_heldout
    rows["held-out categories: FreeSOLO, round 2"] = median([one[HELDOUT_SET] for one in second])
    table = make_table(rows)
    many = len(args.seeds)
    seeds = f"seed {args.seeds[0]}" if many == 1 else f"median of {many} seeds"
    summary = (
        f"200 fresh synthetic scenes and 200 of held-out categories, class-agnostic; {seeds}, "
        f"{iterations} training iterations a round ({others} of Mask R-CNN). {comparison} "
        f"{(time.monotonic() - start) / 60:.1f} minutes."
    )
    results = folders[0] / f"freesolo/round2/inference/{VAL_SET}/coco_instances_results.json"
    page = write_page(
        output,
        table,
        summary,
        draw_photographs(photo_masks, photographs, output / "pictures"),
        draw_scenes(VAL_SET, val_masks, results, output / "pictures"),
    )
    say(f"\n{table}\n\n{summary}\nPictures: {page}")


if __name__ == "__main__":
    main()
