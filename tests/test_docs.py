"""README and the guide: what they name is there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gsscale_nerfstudio.config import gsscale

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES = {file.name: file.read_text() for file in FILES}
SECTIONS = "pipeline|optimizers|machine|logging|viewer"


def flags_of(settings: Any, name: str = "") -> Iterator[str]:
    """Names of a setting and of all below it, as on the command line."""
    yield name
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = vars(settings)
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from flags_of(value, f"{name}.{key.replace('_', '-')}".lstrip("."))


def test_flags_exist():
    known = set(flags_of(gsscale.config))
    named = {
        (page, flag)
        for page, text in PAGES.items()
        for flag in re.findall(rf"--((?:{SECTIONS})\.[\w.-]*\w)", text)
        if "GROUP" not in flag
    }
    assert len(named) > 20
    assert {(page, flag) for page, flag in named if flag not in known} == set()


def test_tests_exist():
    files = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", files, re.MULTILINE))
    named = {name for text in PAGES.values() for name in re.findall(r"`(test_\w+)[`\[]", text)}
    assert len(named) > 20
    assert named - defined - {"test_filenames"} == set()  # a key of transforms.json


def test_what_the_source_distribution_leaves_out():
    said = (
        PAGES["development.md"].split("source distribution\nleaves out")[1].split("(`sdist.ex")[0]
    )
    settings = (ROOT / "pyproject.toml").read_text().split("sdist.exclude = [")[1].split("]")[0]
    assert re.findall("`(.+?)`", said) == re.findall('"(.+?)"', settings)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    """By the end of their path, as in `engines/host.py`; those of users' data are not ours."""
    folders = ["gsscale_nerfstudio", "benchmarks", "csrc", "docs", "tests"]
    ours = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    ends = {"/" + str(path.relative_to(ROOT)) for path in [*ours, *ROOT.glob("*.*")]}
    named = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|json|cpp|toml))`", PAGES[page])
    named += re.findall(r"\b(benchmarks/\w+\.py)", PAGES[page])
    missing = {name for name in named if not any(end.endswith("/" + name) for end in ends)}
    assert {name for name in missing if not name.startswith("transforms")} == set()
