"""Importing the package: it registers, says what is missing, and touches nothing else."""

import os
import subprocess
import sys
import textwrap


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_import_registers_everything():
    done = run(
        """
        import unseg
        from detectron2.data import DatasetCatalog
        from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
        from unseg.data import MAPPERS
        from unseg.discovery import DISCOVERERS
        from unseg.evaluation import EVALUATORS
        assert "build_filter_bank_backbone" in BACKBONE_REGISTRY
        assert "build_dino_vit_backbone" in BACKBONE_REGISTRY
        assert "MaskDiscovery" in META_ARCH_REGISTRY
        assert "DeepSpectral" in META_ARCH_REGISTRY
        assert "InstanceMapper" in MAPPERS
        assert all(name in DISCOVERERS for name in ("FreeMask", "MaskCut", "Spectral", "TokenCut"))
        assert "ClassAgnosticCOCOEvaluator" in EVALUATORS
        assert "VideoMIoUEvaluator" in EVALUATORS
        names = DatasetCatalog.list()
        assert "unseg_synthetic_train" in names
        assert "unseg_coco_2017_val_cls_agnostic" in names
        import sys
        slow = {"sklearn", "timm", "skimage"} & set(sys.modules)  # a second and more
        assert not slow, slow
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_without_detectron2_one_sentence_says_how_to_get_it():
    done = run(
        """
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
        import unseg
        """
    )
    assert done.returncode != 0
    assert "unseg needs Detectron2" in done.stderr
    assert "git+https://github.com/facebookresearch/detectron2.git" in done.stderr


def test_extras_are_not_needed():
    done = run(
        """
        import sys
        sys.modules.update(dict.fromkeys(("faster_coco_eval", "skimage", "supervision")))
        import unseg
        from unseg.evaluation.coco_api import fastest_implementation
        assert fastest_implementation() != "faster_coco_eval"
        """
    )
    assert done.returncode == 0, done.stderr


def test_import_writes_no_files_and_opens_no_connections(tmp_path):
    done = run(
        """
        import socket
        def refuse(*a, **k):
            raise AssertionError("a connection on import")
        socket.socket.connect = refuse
        import unseg
        """,
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        MPLCONFIGDIR=os.environ.get("MPLCONFIGDIR", "/tmp"),
    )
    assert done.returncode == 0, done.stderr
    ours = [p for p in tmp_path.rglob("*") if p.is_file() and "unseg" in str(p)]
    assert not ours
