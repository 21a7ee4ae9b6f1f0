"""Cut exemplars out of images: a pool for Exemplar-FreeSOLO, and a contact sheet to look at.

    python -m unseg.tools.build_exemplars --config-file CONFIG (--images DIR | --dataset NAME)
        --output pool.npz [--resume] [--num-gpus N] [KEY VALUE ...]

The config is that of a trained model with masks (FreeSOLO, any other), whose weights MODEL.WEIGHTS
names; its backbone has the output MODEL.EXEMPLAR.IN_FEATURE. MODEL.EXEMPLAR.BUILD.* say how:
SOURCE folder takes the first PER_CATEGORY images of each class folder in DIR, random takes any,
kmeans those nearest to the centres of a clustering of all images. GrabCut finds the object, the
model refines its mask.

pool.png, the contact sheet, shows every exemplar beside where it is from. A killed run goes on with
--resume. Independent processes, e.g. of a cluster, can share the work: give all of them the same
--num-shards and each its --shard; whoever finds everything done writes the files.
"""

import re
import sys

from torch.multiprocessing import ProcessRaisedException

from unseg.checkpoint import CheckpointError
from unseg.discovery import ExemplarError
from unseg.engine import build_exemplars, find_masks_parser, launch_job

# "package.module.SomeError: " before the message, in the traceback of another process
_CLASS = re.compile(r"(?:[\w.]+\.)?(?P<name>\w+): ")
_EXPECTED = (ExemplarError, CheckpointError, OSError)


def _one_line(error: Exception) -> str:
    """An error's message. One from another process comes as the last line of its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and any(line.lstrip().startswith('File "') for line in lines):
        return _CLASS.sub("", lines[-1], count=1)
    return "; ".join(line.strip() for line in lines)


def _is_expected(error: ProcessRaisedException) -> bool:
    """Whether what a rank raised is about the user's files and settings."""
    found = _CLASS.match(str(error).strip().splitlines()[-1])
    names = {"ImageReadError", "FileNotFoundError", "PermissionError", "NotADirectoryError"}
    names |= {kind.__name__ for kind in _EXPECTED} | {"UnreadableCheckpointError"}
    return found is not None and found["name"] in names


def main() -> None:
    """Entry point."""
    parser = find_masks_parser(__doc__.split("\n\n")[0], output="the .npz file to write")
    try:
        launch_job(build_exemplars, parser)
    except _EXPECTED as error:
        sys.exit(f"error: {_one_line(error)}")
    except ProcessRaisedException as error:
        if not _is_expected(error):
            raise
        sys.exit(f"error: {_one_line(error)}")


if __name__ == "__main__":
    main()
