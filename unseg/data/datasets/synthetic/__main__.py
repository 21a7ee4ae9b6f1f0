"""Write a contact sheet: python -m unseg.data.datasets.synthetic --output sheet.png."""

import argparse
import sys
from dataclasses import replace

import cv2

from unseg.data.datasets.synthetic.contact_sheet import contact_sheet
from unseg.data.datasets.synthetic.presets import PRESETS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unseg.data.datasets.synthetic", description="Look at synthetic scenes."
    )
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--preset", default="default", choices=list(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="index of the first scene")
    parser.add_argument("--count", type=int, default=30, help="number of scenes or clips")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--scale", type=int, default=1, help="enlarge pixels this many times")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--with-masks", action="store_true", help="outline objects and parts")
    options = parser.parse_args(arguments)
    settings = PRESETS[options.preset]
    if options.size:
        settings = replace(settings, size=tuple(options.size))
    sheet = contact_sheet(
        settings,
        options.seed,
        options.start,
        options.count,
        columns=options.columns,
        scale=options.scale,
        with_masks=options.with_masks,
    )
    if not cv2.imwrite(options.output, cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)):
        raise ValueError(f"cannot write {options.output}")
    sys.stdout.write(f"{options.output}: {options.count} of {options.preset}\n")


if __name__ == "__main__":
    main()
