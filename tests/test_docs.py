"""What the documentation names exists: files, modules, flags, config keys, data sets."""

import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from unseg.config import get_cfg

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".venv", "output"} & set(p.parts))


def commands():
    """Every shell command of the pages, continuation lines joined."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split(" #")[0].strip()
                if line and not line.startswith("#"):
                    yield page.relative_to(ROOT), line


COMMANDS = list(commands())
PYTHON_COMMANDS = [c for c in COMMANDS if re.match(r"python (-m unseg|projects|datasets)", c[1])]


HELP_OF_ALL = """
import contextlib, io, json, runpy, sys
texts = {}
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    printed = io.StringIO()
    run = runpy.run_path if "/" in program else runpy.run_module
    try:
        with contextlib.redirect_stdout(printed):
            run(program, run_name="__main__")
    except SystemExit as end:
        texts[program] = printed.getvalue() if not end.code else None
print(json.dumps(texts))
"""


def program_of(words):
    return words[1] if words[0] == "-m" else words[0]


@cache
def helps():
    """What each program of the commands prints for --help; one process imports the package once."""
    programs = sorted({program_of(shlex.split(command)[1:]) for _, command in PYTHON_COMMANDS})
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *programs], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_are_pages_and_commands():
    assert {"README.md", "datasets/README.md", "projects/FreeSOLO/README.md"} <= {
        str(p.relative_to(ROOT)) for p in PAGES
    }
    assert len(PYTHON_COMMANDS) > 8


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda x: str(x)[:60])
def test_files_in_commands_exist(page, command):
    for word in shlex.split(command):
        if re.match(r"(projects|dev|datasets|configs)/\S+\.(py|sh|yaml)$", word):
            assert (ROOT / word).is_file(), f"{page}: {word}"


@pytest.mark.parametrize(("page", "command"), PYTHON_COMMANDS, ids=lambda x: str(x)[:60])
def test_flags_and_keys_exist(page, command):
    words = shlex.split(command)[1:]
    program = program_of(words)
    text = helps()[program]
    assert text, f"{page}: {program} --help fails"
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", text), f"{page}: {program} has no {word}"
        elif re.match(r"[A-Z]+(_[A-Z]+)*\.[A-Z_.]+$", word):
            node = get_cfg()
            for part in word.split("."):
                assert part in node, f"{page}: no config key {word}"
                node = node[part]


def names_of(pattern):
    """Wildcards of a name as people write it: {a,b} are two names, ... and * anything."""
    parts = re.split(r"\{([^}]*)\}", pattern.replace("...", "*"))
    choices = [part.split(",") if n % 2 else [part] for n, part in enumerate(parts)]
    return ["".join(words) for words in product(*choices)]


def test_names_of():
    assert names_of("unseg_x") == ["unseg_x"]
    assert names_of("a_{b,c}_{d,e}") == ["a_b_d", "a_b_e", "a_c_d", "a_c_e"]
    assert names_of("unseg_v0.5_..._x") == ["unseg_v0.5_*_x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_number_is_left_open(page):
    assert "@@" not in page.read_text(), "a placeholder for a number"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for pattern in re.findall(r"`(unseg_[a-z0-9_.*{},]+)`", text):
        for name in names_of(pattern):
            assert any(fnmatch(known, name) for known in DatasetCatalog.list()), name
    for module in re.findall(r"python -m (unseg[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
