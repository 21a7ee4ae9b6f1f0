"""Names of scenes as files: `unseg-synthetic://val/000003.bmp`, `.../val_video/000003/00007.bmp`.

The handler renders what is opened and hands out BMP bytes, so Detectron2's `read_image`, its stock
mappers and anything else that goes through its PathManager read scenes like files. Nothing is
written to disk, unless a local path is asked for.
"""

import io
import os
import re
import tempfile
from dataclasses import dataclass
from typing import IO, Any

import cv2
import numpy as np
from detectron2.utils.file_io import PathHandler

from unseg.data.datasets.synthetic.clips import render_clip_frame
from unseg.data.datasets.synthetic.presets import SceneSet
from unseg.data.datasets.synthetic.scene import render_scene

PREFIX = "unseg-synthetic://"
_FILE = re.compile(r"(?P<index>\d{6,})(/(?P<frame>\d{5}))?\.bmp")


def image_uri(split: str, index: int) -> str:
    return f"{PREFIX}{split}/{index:06d}.bmp"


def frame_uri(split: str, index: int, frame: int) -> str:
    return f"{PREFIX}{split}/{index:06d}/{frame:05d}.bmp"


def encode_bmp(image: np.ndarray) -> bytes:
    """The bytes of a BMP file that holds an (H, W, 3) uint8 RGB image without loss."""
    encoded, data = cv2.imencode(".bmp", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not encoded:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as BMP")
    return data.tobytes()


@dataclass(frozen=True)
class _Scene:
    """What a URI names; `frame` is None in a set of still scenes."""

    scenes: SceneSet
    index: int
    frame: int | None

    def render(self) -> np.ndarray:
        settings, seed = self.scenes.settings, self.scenes.seed
        if self.frame is None:
            return render_scene(settings, seed, self.index).image
        return render_clip_frame(settings, seed, self.index, self.frame).image


class SyntheticPathHandler(PathHandler):
    """Serves the scenes of the sets it has been told of; read-only."""

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, SceneSet] = {}
        self._folder: tuple[int, tempfile.TemporaryDirectory] | None = None

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        """A stream of BMP bytes.

        Raises FileNotFoundError for a URI that names no scene, ValueError for a mode other than
        "rb".
        """
        self._check_kwargs(kwargs)
        if mode != "rb":
            raise ValueError(f"{path}: synthetic scenes can only be opened with mode 'rb'")
        return io.BytesIO(encode_bmp(self._find(path).render()))

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path, **kwargs) or self._isdir(path, **kwargs)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return self._match(path) is not None

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return self._listing(path) is not None

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        """Sets under the prefix, files (or clips) under a set, frames under a clip."""
        self._check_kwargs(kwargs)
        listing = self._listing(path)
        if listing is None:
            raise NotADirectoryError(f"{path} is no folder of synthetic scenes; {self._valid()}")
        return listing

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Write the scene to this process's temporary folder, once, and return the file's path."""
        self._check_kwargs(kwargs)
        found = self._find(path)
        local = os.path.join(self._temporary_folder(), *path[len(PREFIX) :].split("/"))
        if force or not os.path.exists(local):
            os.makedirs(os.path.dirname(local), exist_ok=True)
            partial = f"{local}.part"
            with open(partial, "wb") as file:
                file.write(encode_bmp(found.render()))
            os.replace(partial, local)
        return local

    def _temporary_folder(self) -> str:
        if self._folder is None or self._folder[0] != os.getpid():
            folder = tempfile.TemporaryDirectory(prefix="unseg-synthetic-")
            self._folder = (os.getpid(), folder)
        return self._folder[1].name

    def _match(self, path: str) -> _Scene | None:
        split, _, file = path[len(PREFIX) :].partition("/")
        scenes, match = self.sets.get(split), _FILE.fullmatch(file)
        if scenes is None or match is None:
            return None
        index, frame = int(match["index"]), match["frame"]
        is_clip = scenes.settings.frames > 1
        if index >= scenes.count or is_clip != (frame is not None):
            return None
        if not is_clip:
            return _Scene(scenes, index, None)
        return _Scene(scenes, index, int(frame)) if int(frame) < scenes.settings.frames else None

    def _find(self, path: str) -> _Scene:
        found = self._match(path)
        if found is None:
            raise FileNotFoundError(f"{path} names no synthetic scene; {self._valid()}")
        return found

    def _listing(self, path: str) -> list[str] | None:
        split, _, clip = path[len(PREFIX) :].strip("/").partition("/")
        if not split:
            return sorted(self.sets)
        scenes = self.sets.get(split)
        if scenes is None:
            return None
        is_clip = scenes.settings.frames > 1
        if not clip:
            return [f"{i:06d}" if is_clip else f"{i:06d}.bmp" for i in range(scenes.count)]
        if is_clip and re.fullmatch(r"\d{6,}", clip) and int(clip) < scenes.count:
            return [f"{frame:05d}.bmp" for frame in range(scenes.settings.frames)]
        return None

    def _valid(self) -> str:
        """The names that exist, for error messages."""
        lines = []
        for split, scenes in sorted(self.sets.items()):
            last = scenes.count - 1
            files = f"000000.bmp..{last:06d}.bmp"
            if scenes.settings.frames > 1:
                files = f"000000/..{last:06d}/ 00000.bmp..{scenes.settings.frames - 1:05d}.bmp"
            lines.append(f"{PREFIX}{split}/ {files}")
        return "valid names: " + "; ".join(lines)
