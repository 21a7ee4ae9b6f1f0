"""Checkpoints that survive a kill at any moment, and loading that runs no code."""

import os
import re
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor

from unseg.checkpoint.files import atomic_write
from unseg.checkpoint.safe import (
    CheckpointError,
    UnreadableCheckpointError,
    load_weights_file,
)

# What our trainer writes. Other files of an output folder (a backbone's weights, say) are not
# checkpoints of the run.
_OWN_NAME = re.compile(r"model_(\d{7}|final)\.pth")


class _SafeFiles(Checkpointer):
    """The bottom of the class hierarchy: what DetectionCheckpointer's ``super()`` reaches."""

    def _load_file(self, filename: str) -> Any:
        return load_weights_file(filename)


class SafeCheckpointer(DetectionCheckpointer, _SafeFiles):
    """Detectron2's checkpointer with whole files only and without arbitrary pickles.

    * Files are written beside their name and renamed, so a kill leaves the previous state.
    * If the last checkpoint cannot be read all the same (a full disk, a copy cut short), resuming
      falls back to the newest one that can. A readable checkpoint of another run is no reason to.
    * ``.pth`` is read with ``weights_only=True``, ``.pkl`` with numpy arrays only.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Save ``<save_dir>/<name>.pth`` and make it the last checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path, "wb") as file:
            torch.save(data, file)
        self.tag_last_checkpoint(basename)

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        """Save ``<save_dir>/<name>.pth`` with these weights alone; `name` is in a subfolder, where
        resuming does not look."""
        if self.save_dir and self.save_to_disk:
            with atomic_write(os.path.join(self.save_dir, f"{name}.pth"), "wb") as file:
                torch.save({"model": weights}, file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the newest readable checkpoint of ``save_dir``, or load weights from `path`.

        Returns:
            what the checkpoint holds beside the model and this checkpointer's objects.

        Raises:
            CheckpointError: there are checkpoints and none can be read (starting over without
                ``--resume`` must be the user's decision), or one of our objects refused it.
        """
        candidates = self._candidates() if resume else []
        if not candidates:
            return self.load(path, checkpointables=[])
        failures = []
        for candidate in candidates:
            try:
                if not os.path.isfile(candidate):
                    raise UnreadableCheckpointError(f"{candidate} does not exist")
                return self.load(candidate)
            except UnreadableCheckpointError as error:
                self._parsed_url_during_load = None  # Detectron2 main keeps it after a failure
                self.logger.warning("%s; trying the checkpoint before it", error)
                failures.append(str(error))
        raise CheckpointError("no checkpoint can be read:\n" + "\n".join(failures))

    def has_checkpoint(self) -> bool:
        return bool(self._candidates())

    def _candidates(self) -> list[str]:
        """The file that ``last_checkpoint`` names, then our trainer's others, the newest first."""
        if not self.save_dir or not os.path.isdir(self.save_dir):
            return []
        files = self.get_all_checkpoint_files()
        others = [file for file in files if _OWN_NAME.fullmatch(os.path.basename(file))]
        others.sort(key=os.path.getmtime, reverse=True)
        tagged = self.get_checkpoint_file()
        return [tagged, *(file for file in others if file != tagged)] if tagged else others

    def _load_file(self, filename: str) -> Any:
        if filename.endswith((".pkl", ".pyth")):
            # Detectron2 unpickles these itself to recognise model-zoo formats: let it do so only
            # once the file is known to hold nothing but arrays.
            load_weights_file(filename)
        return super()._load_file(filename)
