"""docs/decisions.md and the code hold on to each other: citations point to entries, entries to files and tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/decisions.md").read_text()
ENTRIES = {
    int(number): body for number, body in re.findall(r"^## (\d+)\. (.*?)(?=^#{1,2} |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}
# "docs/decisions.md, 8 and 11" or "docs/decisions.md 9": what follows the name up to the last number of a list.
CITATION = re.compile(r"docs/decisions\.md,? (\d+(?:(?:, | and )\d+)*)")
SOURCES = [
    path
    for folder in ("vidla", "vidla_kernels", "tests", "benchmarks", "docs")
    for ending in ("*.py", "*.toml", "*.md")
    for path in (ROOT / folder).rglob(ending)
]


def test_entries_are_numbered_without_a_gap():
    assert list(ENTRIES) == list(range(1, 14))


def test_citations_point_to_entries():
    cited = {
        (str(path.relative_to(ROOT)), int(number))
        for path in SOURCES
        for numbers in CITATION.findall(path.read_text(encoding="utf-8"))
        for number in re.findall(r"\d+", numbers)
    }
    assert len(cited) > 10, "the pattern no longer finds the citations"
    assert not {(path, number) for path, number in cited if number not in ENTRIES}


@pytest.mark.parametrize("number", ENTRIES)
def test_entry_names_code_and_tests_that_exist(number):
    entry = ENTRIES[number]
    code, tests = (re.search(rf"\*\*{part}\.\*\*(.*?)(?=\n\n|\Z)", entry, re.DOTALL).group(1) for part in ("Code", "Test"))
    files = [path for path in re.findall(r"`([\w/]+\.py)`", code) if not path.startswith("tests/")]
    assert files, "no source file"
    assert all((ROOT / path).is_file() for path in files), files
    check_names(code, files)
    held_by = re.findall(r"`(tests/[\w/]+\.py)`", tests)
    assert held_by, "no test file"
    assert all((ROOT / path).is_file() for path in held_by), held_by
    check_names(tests, held_by)


def test_everything_else_named_exists():
    rest = PAGE.split("# Engineering decisions", 1)[1]
    files = re.findall(r"`([\w/]+/\w+\.py)`", rest)
    assert len(files) > 10
    assert all((ROOT / path).is_file() for path in files), files
    check_names(rest, [path for path in files if path.startswith("tests/")], pattern=r"`(test_\w+)`")


def check_names(text: str, files: list[str], pattern: str = r"`([A-Za-z_][\w.]*\w)`") -> None:
    """Each function, class or field that the text names in backticks occurs in one of the files it names."""
    source = "\n".join((ROOT / path).read_text() for path in files)
    for name in re.findall(pattern, text):
        last = name.rsplit(".", 1)[-1]
        assert re.search(rf"(?:def|class) {last}\b|\b{last}\b *[:=]|{last}=", source), f"{name} is in none of {files}"
