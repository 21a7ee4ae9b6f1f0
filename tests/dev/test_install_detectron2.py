"""The pure-Python Detectron2: nothing is installed that is not what the script expects."""

import ast
import importlib.util
import io
import sys
import tarfile
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch

from unseg import compat

PATH = Path(__file__).resolve().parents[2] / "dev/install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", PATH)
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def test_substitutions_must_match_exactly_as_often_as_they_say(tmp_path):
    (tmp_path / "a.py").write_text("x = np.int(3)\ny = np.integer\nz = np.int\n")
    once = install.Substitution("a.py", r"\bnp\.int\b", "int", 1)
    with pytest.raises(RuntimeError, match=r"a\.py: .* matched 2 times, expected 1"):
        once.apply(tmp_path)
    install.Substitution("a.py", r"\bnp\.int\b", "int", 2).apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = int(3)\ny = np.integer\nz = int\n"


def fake_index(monkeypatch, data):
    page = f'<a href="../files/{install.SDIST}#sha256={install.SHA256}">x</a>'
    answers = {"simple": page.encode(), "files": data}

    def urlopen(url, timeout):
        return io.BytesIO(answers["files" if "files" in url else "simple"])

    monkeypatch.setenv("PIP_INDEX_URL", "https://example.invalid/simple/")
    monkeypatch.setattr(install.urllib.request, "urlopen", urlopen)


def test_other_archives_are_refused(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("setup.py"))
    fake_index(monkeypatch, buffer.getvalue())
    with pytest.raises(RuntimeError, match="has sha256 .*, expected 53c9e79e"):
        install.download_sdist(tmp_path / "x.tar.gz")
    assert not list(tmp_path.iterdir())


def test_an_unreachable_index_is_named(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise OSError("no route")

    monkeypatch.setenv("PIP_INDEX_URL", "https://example.invalid/simple/")
    monkeypatch.setattr(install.urllib.request, "urlopen", urlopen)
    with pytest.raises(RuntimeError, match=r"example\.invalid/simple/detectron2-cdo/: no route"):
        install.download_sdist(tmp_path / "x.tar.gz")


@pytest.mark.skipif(
    compat.detectron2_extension() is not None, reason="Detectron2 has its C++ extension here"
)
def test_without_the_extension_its_functions_say_so():
    from detectron2.layers.deform_conv import ModulatedDeformConv
    from detectron2.layers.rotated_boxes import pairwise_iou_rotated

    with pytest.raises(ImportError, match="box_iou_rotated is not available"):
        pairwise_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
    assert ModulatedDeformConv is not None


PACKAGE = Path(detectron2.__path__[0])
ours = pytest.mark.skipif(
    not (PACKAGE.parent / install.MARKER).is_file(), reason="not the Detectron2 of our script"
)


@ours
def test_no_name_that_numpy_removed_is_left():
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_numpy = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "np"
            if is_numpy and not hasattr(np, node.attr):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: np.{node.attr}")
    assert found == []


def test_voc_is_read(shared_datasets):
    from detectron2.data.datasets import load_voc_instances
    from detectron2.data.datasets.pascal_voc import CLASS_NAMES

    records = load_voc_instances(str(shared_datasets / "VOC2012"), "train", CLASS_NAMES)
    assert [len(r["annotations"]) > 0 for r in records] == [True] * 3
    assert all(Path(r["file_name"]).is_file() for r in records)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (None, True),  # somebody else's
        ("_C = _MissingExtension()\n", False),  # ours, before there were build ids
        ('BUILD = "0123456789abcdef"\n', False),
        (f'BUILD = "{install.build_id()}"\n', True),
    ],
)
def test_only_older_builds_of_ours_are_replaced(tmp_path, monkeypatch, content, kept):
    package = tmp_path / "detectron2"
    (package / "utils").mkdir(parents=True)
    if content is not None:
        (tmp_path / install.MARKER).write_text(content)
    assert install.is_current(package) == kept

    calls = []
    module = importlib.util.spec_from_loader("detectron2", None)
    module.submodule_search_locations = [str(package)]
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setattr(install, "prepare_source", lambda folder: folder / "source")
    monkeypatch.setattr(install.subprocess, "check_call", lambda words: calls.append(words[3]))
    monkeypatch.setattr(sys, "argv", ["install_detectron2.py"])
    install.main()
    assert calls == ([] if kept else ["uninstall", "install"])


def test_a_changed_substitution_is_another_build(monkeypatch):
    before = install.build_id()
    assert before == install.build_id()
    monkeypatch.setattr(install, "SUBSTITUTIONS", install.SUBSTITUTIONS[1:])
    assert install.build_id() != before


def test_model_zoo_configs_are_installed():
    from detectron2 import model_zoo

    path = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    assert model_zoo.get_config(path).MODEL.MASK_ON
