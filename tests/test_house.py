"""Rules of the house that no type checker knows: where tests stand, who imports whom, what files are called."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.run import VERSION

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "pipeline", "actors", "deploy")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SPEECH = ROOT / "tests" / "data" / "speech"

# A module of this many lines or fewer holds names or a docstring, nothing that could be wrong.
FREE_LINES = 20

# Names that say nothing about what is inside, so everything ends up inside.
EMPTY_WORDS = {"utils", "util", "common", "helpers", "helper", "core", "manager", "misc"}

# In pieces, so that this file does not contain what it looks for.
UNFINISHED = re.compile("|".join((r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"sys\.path\.(?:" + r"append|insert)\(")))

VERBS = ("transcribe", "run", "plan", "status", "fetch", "bench")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_every_module_has_its_test(module: Path) -> None:
    if len(module.read_text().splitlines()) <= FREE_LINES:
        return
    inside = module.relative_to(ROOT)
    test = ROOT / "tests" / inside.parent / f"test_{inside.name}"
    assert test.is_file(), f"{inside} has no {test.relative_to(ROOT)}"


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_modules_are_named_after_something(module: Path) -> None:
    words = {word for part in module.relative_to(ROOT).with_suffix("").parts for word in part.split("_")}
    assert not words & EMPTY_WORDS


def test_the_import_contract_holds() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_installed_package_takes_our_import_names() -> None:
    """The names of our packages are generic; another package that ships one of them would shadow or overwrite ours."""
    clashes: set[str] = set()
    for distribution in importlib.metadata.distributions():
        if distribution.name == "kikitori":
            continue
        top = {file.parts[0].removesuffix(".py") for file in distribution.files or ()}
        clashes |= {f"{distribution.name} ships {name}" for name in top & set(PACKAGES)}
    assert not clashes


def test_no_test_folder_is_a_package() -> None:
    """`tests/pipeline/__init__.py` would itself become the package `pipeline` and hide the real one."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_is_left_unfinished() -> None:
    folders = [*PACKAGES, "tests", "benchmarks", "configs"]
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".yaml"}
    ]
    assert not [relative(path) for path in files if UNFINISHED.search(path.read_text())]


@pytest.mark.parametrize("verb", VERBS)
def test_the_readme_shows_every_verb(verb: str) -> None:
    assert re.search(rf"\bkikitori {verb}\b", (ROOT / "README.md").read_text())


def test_every_bundled_clip_has_a_text_and_an_origin() -> None:
    clips = {path.relative_to(SPEECH).as_posix() for path in SPEECH.rglob("*") if path.suffix in {".wav", ".flac"}}
    references = [json.loads(line) for line in (SPEECH / "references.jsonl").read_text().splitlines()]
    assert {reference["file"] for reference in references} == clips
    assert all(reference["text"] for reference in references)
    attribution = (SPEECH / "ATTRIBUTION.md").read_text()
    assert not [clip for clip in clips if clip.startswith("people/") and f"`{Path(clip).name}`" not in attribution]
    expected = json.loads((SPEECH / "digits_expected.json").read_text())
    assert {clip["file"] for clip in expected} == {clip for clip in clips if clip.startswith("digits/")}


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
