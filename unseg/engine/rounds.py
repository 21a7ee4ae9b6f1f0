"""What each round of self-training ends with: its metrics, as files and as a table."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from tabulate import tabulate

from unseg.checkpoint import atomic_write
from unseg.discovery.io import read_header
from unseg.engine.trainer import Trainer

RESULTS_FILE = "results.json"  # of a round and of the whole run, each in its folder

Results = dict[str, Any]  # see unseg.engine.self_train

_SHOWN = ("AP", "AP50", "AP75", "AR@100")  # of tasks that have them; of others all metrics


class RoundTrainer(Trainer):
    """Writes its metrics (data set -> task -> metric) as ``results.json`` when all else is done."""

    def train(self) -> Any:
        result = super().train()
        if comm.is_main_process():
            metrics = self._last_eval_results
            names = self.cfg.DATASETS.TEST
            if len(names) == 1:  # Detectron2 leaves its name out
                metrics = {names[0]: metrics}
            with atomic_write(Path(self.cfg.OUTPUT_DIR) / RESULTS_FILE) as file:
                json.dump(_without_nan(metrics), file, indent=1, allow_nan=False)
        return result


def mask_statistics_in(path: Path) -> dict[str, Any] | None:
    """The statistics that a file of masks says it has; None for files of another origin."""
    header = read_header(path)
    return None if header is None else header.get("statistics")


def make_table(results: Results) -> str:
    """Markdown: for each data set a row per round, with the metrics of each task in percent."""
    rounds = results["rounds"]
    tables = []
    for name, tasks in rounds[0]["metrics"].items():
        columns = [
            (task, metric)
            for task, values in tasks.items()
            for metric in ([m for m in _SHOWN if m in values] or values)
        ]
        rows = []
        for one in rounds:
            statistics = one["mask_statistics"]
            numbers = [one["metrics"][name][task][metric] for task, metric in columns]
            rows.append([one["round"], statistics["masks"] if statistics else None, *numbers])
        header = ["round", "masks learned from", *(" ".join(column) for column in columns)]
        table = tabulate(rows, header, tablefmt="pipe", floatfmt=".2f", missingval="-")
        tables.append(f"{name}\n\n{table}")
    return "\n\n".join(tables)


def _without_nan(value: Any) -> Any:
    """JSON-able: numbers that are NaN (no objects of a size) become None."""
    if isinstance(value, Mapping):
        return {key: _without_nan(v) for key, v in value.items()}
    return None if math.isnan(value) else float(value)
