"""Statistics, table and plot of numbers by arm, seed and metric."""

import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from matplotlib.figure import Figure

Results = dict[str, dict[int, dict[str, float | None]]]  # arm -> seed -> metric; None for NaN
Summary = dict[str, dict[str, dict[str, Any]]]  # arm -> metric -> see summarize


def write_report(
    folder: Path,
    results: Results,
    settings: Mapping[str, Any],
    titles: Mapping[str, str],
    reference: str,
) -> str:
    """Write results.json, table.md and plot.png of the arms that have titles.

    Args:
        folder: where to.
        results: the numbers.
        settings: noted in results.json.
        titles: what to call the arms, in the order of the table.
        reference: the arm that the others are compared with.

    Returns:
        the table.
    """
    results = {arm: results[arm] for arm in titles if arm in results}
    summary = summarize(results, reference)
    table = make_table(summary, titles, reference)
    content = {"settings": settings, "reference": reference}
    content |= {"numbers": results, "summary": summary}
    write_whole(folder / "results.json", json.dumps(content, indent=1, allow_nan=False))
    write_whole(folder / "table.md", f"{table}\n")
    plot = io.BytesIO()
    draw_plot(results, titles, reference, plot)
    write_whole(folder / "plot.png", plot.getvalue())
    return table


def summarize(results: Results, reference: str) -> Summary:
    """Statistics over the seeds.

    Returns:
        arm -> metric -> ``value`` and, for arms other than the reference, ``difference`` to the
        reference's number of the same seed; each with ``mean``, ``spread`` (sample standard
        deviation) and ``seeds`` (how many). None where there are too few seeds.
    """
    summary: Summary = {}
    for arm, seeds in results.items():
        summary[arm] = {}
        for metric in _metrics_of(seeds.values()):
            own, others = (_by_seed(results.get(a, {}), metric) for a in (arm, reference))
            summary[arm][metric] = {"value": _statistic(list(own.values()))}
            if arm != reference:
                pairs = [own[seed] - others[seed] for seed in own if seed in others]
                summary[arm][metric]["difference"] = _statistic(pairs)
    return summary


def make_table(summary: Summary, titles: Mapping[str, str], reference: str) -> str:
    """Markdown: a row per arm; below, a row per arm with the differences to the reference."""
    metrics = _metrics_of(summary.values())
    digits = {}
    for metric in metrics:
        means = [arm[metric]["value"]["mean"] for arm in summary.values() if metric in arm]
        digits[metric] = 1 if any(mean is not None and abs(mean) >= 10 for mean in means) else 2
    lines = ["| | seeds | " + " | ".join(metrics) + " |", "|---|" + "---|" * (len(metrics) + 1)]
    for kind in ("value", "difference"):
        for arm in (a for a in titles if a in summary and (kind == "value" or a != reference)):
            title = titles[arm] if kind == "value" else f"{titles[arm]} − {titles[reference]}"
            row = {metric: one[kind] for metric, one in summary[arm].items()}
            seeds = max((one["seeds"] for one in row.values()), default=0)
            sign = "+" if kind == "difference" else ""
            cells = [_cell(row.get(m), f"{sign}z.{digits[m]}f") for m in metrics]
            lines.append(f"| {title} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_plot(results: Results, titles: Mapping[str, str], reference: str, file: IO[bytes]) -> None:
    """A PNG: a panel per metric, in it a line per arm with each seed, mean and spread."""
    arms = [arm for arm in titles if arm in results]
    metrics = _metrics_of(numbers for arm in arms for numbers in results[arm].values())
    columns = max(1, min(3, len(metrics)))
    rows = max(1, math.ceil(len(metrics) / columns))
    size = (2 + 3 * columns, rows * (0.9 + 0.3 * len(arms)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        panel.set_title(metric, fontsize="medium")
        for height, arm in enumerate(arms):
            values = list(_by_seed(results[arm], metric).values())
            panel.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.4, ms=4)
            whole = _statistic(values)
            if values:
                panel.errorbar(whole["mean"], height, xerr=whole["spread"], fmt="k|", capsize=3)
            if values and arm == reference:
                panel.axvline(whole["mean"], color="0.6", linestyle="--", linewidth=1)
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    panels[0].set_yticks(range(len(arms)), [titles[arm] for arm in arms])
    panels[0].invert_yaxis()  # of all panels, which share it
    figure.savefig(file, format="png")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or not there, whoever else writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def _metrics_of(numbers: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(metric for one in numbers for metric in one))


def _by_seed(seeds: Mapping[int, Mapping[str, float | None]], metric: str) -> dict[int, float]:
    return {seed: n[metric] for seed, n in seeds.items() if n.get(metric) is not None}


def _statistic(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


def _cell(one: Mapping[str, Any] | None, form: str) -> str:
    if one is None or one["mean"] is None:
        return "–"
    spread = "" if one["spread"] is None else f" ± {one['spread']:{form.removeprefix('+')}}"
    return f"{one['mean']:{form}}{spread}"
