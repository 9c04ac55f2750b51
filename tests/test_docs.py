"""Documentation and code agree, and the bans of .pre-commit-config.yaml hold. The rest, which starts every command, is
`python .ci/check_docs.py`."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # comes with huggingface_hub

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("check_docs", ROOT / ".ci" / "check_docs.py")
check_docs = importlib.util.module_from_spec(SPEC)
sys.modules["check_docs"] = check_docs
SPEC.loader.exec_module(check_docs)

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
BANS = {hook["id"]: hook for hook in HOOKS if hook["language"] == "pygrep"}
SOURCES = [
    path
    for folder in ("vidla", "vidla_kernels", "tests", "benchmarks", "docs", ".ci")
    for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", check_docs.documents(), ids=lambda path: path.name)
@pytest.mark.parametrize("check", check_docs.CHEAP, ids=lambda check: check.__name__)
def test_documents_agree_with_the_tree(check, path):
    assert not list(check(path, path.read_text(encoding="utf-8")))


def test_the_readmes_map_is_the_tree():
    assert not list(check_docs.check_map((ROOT / "README.md").read_text(encoding="utf-8")))


def test_the_readmes_test_command_is_printed_for_ci():
    printed = subprocess.run([sys.executable, ROOT / ".ci" / "check_docs.py", "--test-command"], capture_output=True, text=True)
    assert printed.stdout == "pip install -e '.[test]' && pytest\n"


@pytest.mark.parametrize("document", ["README.md", "docs/training.md"])
def test_the_last_line_of_a_run_is_as_documented(document):
    source = (ROOT / "vidla" / "train.py").read_text(encoding="utf-8")
    printed = source[source.index('"final: ') :].split("flush=True")[0]
    (line,) = re.findall(r"^final: .*$", (ROOT / document).read_text(encoding="utf-8"), re.M)
    assert re.findall(r"([\w@]+)=<", line) == re.findall(r"([\w@]+)=\{", printed)


@pytest.mark.parametrize(
    ("check", "text", "complaint"),
    [
        ("check_links", "text\n[x](docs/absent.md)", "2: link to docs/absent.md: no such file"),
        ("check_links", "[x](README.md#no-such)", "1: link to README.md#no-such: no such heading"),
        ("check_paths", "`vidla/absent.py`", "1: `vidla/absent.py`: no such path"),
        ("check_paths", "`vidla/train.py::absent`", "1: `vidla/train.py::absent`: vidla/train.py defines no absent"),
        ("check_paths", "`absent/`", "1: `absent/`: no such path"),
        ("check_python", "```python\nx = (\n```", "'(' was never closed"),
        ("check_commands", "```sh\npython -m vidla.absent\n```", "2: python -m vidla.absent: no such module"),
        ("check_commands", "```sh\nls && python -m vidla.loss\n```", "it would do nothing"),
        ("check_commands", "see `python -m vidla.digits OUT --absent 3`", "1: -m vidla.digits has no option --absent"),
        ("check_commands", "```sh\nX=1 pytest tests/absent.py\n```", "2: pytest tests/absent.py: no such test"),
        ("check_commands", "```sh\n.ci/absent\n```", "2: .ci/absent: no such program in this tree"),
        ("check_commands", "```sh\nno-such-program x\n```", "2: no-such-program: command not found"),
        ("run_python", "<!-- run -->\n```python\n1 / 0\n```", "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_found(check, text, complaint):
    found = list(getattr(check_docs, check)(ROOT / "README.md", text))
    assert len(found) == 1
    assert complaint in found[0]


def test_a_map_that_lacks_or_invents_something_is_found():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any("map: vidla/loss.py is missing" in what for what in check_docs.check_map(readme.replace("  loss.py, ", "  ")))
    assert any("map: docs/ is missing" in what for what in check_docs.check_map(readme.replace("\ndocs/ ", "\ntests/ ")))
    assert any("map: absent/ does not exist" in what for what in check_docs.check_map(readme.replace("\ndocs/ ", "\nabsent/ ")))


@pytest.mark.parametrize("ban", BANS)
def test_a_ban_holds(ban):
    pattern, files = re.compile(BANS[ban]["entry"]), re.compile(BANS[ban]["files"])
    searched = [path for path in SOURCES if files.search(path.relative_to(ROOT).as_posix())]
    assert searched
    found = [
        f"{path}:{number}: {line}"
        for path in searched
        for number, line in enumerate(path.open(encoding="utf-8"), 1)
        if pattern.search(line)
    ]
    assert not found, BANS[ban]["name"]


FORBIDDEN = {
    "no-atomics": ["    tl.atomic" + "_add(p_dq, dq)"],
    "kernels-stand-alone": [
        "import vidla",
        "from vidla import loss",
        "    from vidla.loss import contrastive_loss",
        "import vidla.loss",
    ],
    "weights-only": ["state = torch.load" + "(path)", "torch.load" + "(path, weights_only=False)"],
    "no-pickle": ["import pickle", "    from pickle import loads", "import cloudpickle as pickle"],
}
ALLOWED = [
    "import vidla_kernels",
    "from vidla_kernels import tiles",
    "torch.load(path, weights_only=True)",
    "# It pickles.",
    "tl.dot(a, b)",
]


def test_every_ban_has_examples():
    assert set(FORBIDDEN) == set(BANS)


@pytest.mark.parametrize(("ban", "line"), [(ban, line) for ban, lines in FORBIDDEN.items() for line in lines])
def test_a_ban_catches(ban, line):
    assert re.search(BANS[ban]["entry"], line)


@pytest.mark.parametrize("line", ALLOWED)
def test_what_is_allowed_is_not_caught(line):
    assert not [ban for ban in BANS if re.search(BANS[ban]["entry"], line)]
