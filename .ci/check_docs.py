"""That the documentation tells the truth: what it shows must exist in this tree.

    python .ci/check_docs.py                  everything below; one line for each thing that is wrong, exit code 1
    python .ci/check_docs.py --test-command   the test command as the README has it, for .ci/run

In README.md, CONTRIBUTING.md, docs/*.md and docs/gpu/README.md: relative links and headings they point to; paths in backticks
(`folder/file.py`, `folder/`, `folder/file.py::name`); the README's map of the folders; fenced Python, which must compile, and
where `<!-- run -->` stands before it must run; commands, fenced or in backticks, whose modules, options and files must exist.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for what is run from the checkout and not installed: benchmarks
MADE_BY_A_RUN = (
    "runs",
    "checkpoints",
    "data",
    "shards",
    "tensorboard",
    "previous-1",
)  # first folders of paths that no clone has
OPTIONAL = ("cd", "export", "pre-commit", "nvidia-smi", "nvcc", "cmake")  # of the shell, or not on every machine
FENCE = re.compile(r"^(?:<!-- ([a-z-]+) -->\n+)?```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A fenced block: the marker comment before it, its language, its text, the number of its first line."""

    marker: str
    language: str
    text: str
    line: int


def documents(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md")), root / "docs/gpu/README.md"]


def blocks(text: str) -> list[Block]:
    return [Block(m[1] or "", m[2], m[3], text[: m.start(3)].count("\n") + 1) for m in FENCE.finditer(text)]


def prose(text: str) -> str:
    """The text with fenced blocks blanked, lines kept."""
    return FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)


def numbered(pattern: str | re.Pattern, text: str) -> Iterator[tuple[int, str]]:
    return ((text[: m.start()].count("\n") + 1, m[1]) for m in re.finditer(pattern, text))


def test_command(readme: str) -> str:
    """The command in the block marked `<!-- test-command -->`."""
    (block,) = (b for b in blocks(readme) if b.marker == "test-command")
    return block.text.strip()


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_links(path: Path, text: str) -> Iterator[str]:
    for line, target in numbered(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            yield f"{line}: link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{line}: link to {target}: no such heading"


def check_paths(path: Path, text: str, root: Path = ROOT) -> Iterator[str]:
    for line, code in numbered(INLINE, prose(text)):
        name, _, symbol = code.partition("::")
        first = name.split("/")[0]
        if not re.fullmatch(r"[\w.*-]+(/[\w.*-]*)+", name) or not name.endswith((".py", ".md", ".toml", ".json", "/")):
            continue
        if first in MADE_BY_A_RUN or first.isupper():  # OUTPUT/config.toml: a placeholder
            continue
        found = [*root.glob(name), *path.parent.glob(name)]
        if not found:
            yield f"{line}: `{code}`: no such path"
        elif symbol and not re.search(rf"^\s*(def |class )?{symbol}\b", found[0].read_text(encoding="utf-8"), re.M):
            yield f"{line}: `{code}`: {name} defines no {symbol}"


def check_map(readme: str, root: Path = ROOT) -> Iterator[str]:
    """The block marked `<!-- map -->` names every folder of the tree, and every module of those it opens."""
    (block,) = (b for b in blocks(readme) if b.marker == "map")
    ignored = [p.strip("/") for p in (root / ".gitignore").read_text(encoding="utf-8").split()]
    opened: dict[str, set[str]] = {}
    folder = ""
    for line, entry in enumerate(block.text.splitlines(), block.line):
        inside = entry.startswith(" ")
        for name in re.split(r"\s{2,}", entry.strip())[0].split(", "):
            if not inside:
                folder = name
            if not (root / folder / (name if inside else "")).exists():
                yield f"{line}: map: {folder if inside else ''}{name} does not exist"
            opened.setdefault(folder, set()).update([name.strip("/")] if inside else [])
    folders = {p.name for p in root.iterdir() if p.is_dir() and (not p.name.startswith(".") or p.name == ".ci")}
    here = {name for name in folders if not any(fnmatch.fnmatch(name, p) for p in ignored)}
    yield from (f"{block.line}: map: {name}/ is missing" for name in sorted(here) if f"{name}/" not in opened)
    for name, listed in opened.items():
        modules = {p.name for p in (root / name).glob("*.py") if p.name != "__init__.py"} if listed else set()
        yield from (f"{block.line}: map: {name}{module} is missing" for module in sorted(modules - listed))


def check_python(path: Path, text: str) -> Iterator[str]:
    for block in blocks(text):
        if block.language == "python":
            try:
                ast.parse(block.text)
            except SyntaxError as error:
                yield f"{block.line - 1 + (error.lineno or 1)}: Python: {error.msg}"


def run_python(path: Path, text: str) -> Iterator[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for block in blocks(text):
        if block.marker == "run":
            with tempfile.TemporaryDirectory() as empty:
                done = subprocess.run([sys.executable, "-c", block.text], cwd=empty, env=env, capture_output=True, text=True)
            if done.returncode:
                yield f"{block.line}: does not run: {done.stderr.strip().splitlines()[-1]}"


def commands(text: str) -> Iterator[tuple[int, str]]:
    """(line, command) of sh blocks, continuations joined, and of commands in backticks."""
    for block in blocks(text):
        if block.language in ("sh", "bash", "console"):
            joined = re.sub(r"\\\n\s*", lambda m: " " * len(m[0]), block.text)
            for line, command in enumerate(joined.splitlines(), block.line):
                prompted = block.language != "console" or command.startswith("$ ")
                if prompted and command.strip() and not command.startswith("#"):
                    yield line, command.removeprefix("$ ")
    for line, code in numbered(INLINE, prose(text)):
        if re.match(r"(\w+=\S+ )*(python|torchrun|pytest|pip|ruff|\.ci/\w+) ", code):
            yield line, code


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def check_command(words: list[str]) -> Iterator[str]:
    """One command without pipes: its program, modules, options and files."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, words = words[0], words[1:]
    if program in ("python", "torchrun"):
        at = words.index("-m") if "-m" in words else len(words)
        before, module, words = words[:at], words[at + 1 : at + 2], words[at + 2 :]
        if program == "torchrun":
            yield from unknown_options(before, sys.executable, "-m", "torch.distributed.run")
        elif before and before[0] != "-c" and not (ROOT / before[0]).is_file():
            yield f"no such script: {before[0]}"
        for name in module:
            spec = importlib.util.find_spec(name)
            spec = importlib.util.find_spec(f"{name}.__main__") if spec and spec.submodule_search_locations else spec
            if not spec or not spec.origin:
                yield f"python -m {name}: no such module"
            elif "__main__" not in Path(spec.origin).read_text(encoding="utf-8"):
                yield f"python -m {name}: the module is no command, it would do nothing"
            else:
                yield from unknown_options(words, sys.executable, "-m", name)
    elif "/" in program:
        if not os.access(ROOT / program, os.X_OK):
            yield f"{program}: no such program in this tree"
    elif program == "pytest":
        folder = ["benchmarks"] if any(word.startswith("benchmarks") for word in words) else []  # has options of its own
        yield from unknown_options(words, sys.executable, "-m", "pytest", *folder)
        for file, _, test in (w.partition("::") for w in words if re.match(r"(tests|benchmarks)\b", w)):
            if not (ROOT / file).exists() or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")):
                yield f"pytest {file}{'::' if test else ''}{test}: no such test"
    elif not any(map(shutil.which, (program, Path(sys.executable).with_name(program)))) and program not in OPTIONAL:
        yield f"{program}: command not found"


def unknown_options(words: list[str], *command: str) -> Iterator[str]:
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(*command)):
            yield f"{' '.join(command[1:])} has no option {option}"


def check_commands(path: Path, text: str) -> Iterator[str]:
    for line, command in commands(text):
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        for separator, words in itertools.groupby(lexer, lambda word: set(word) <= set("&|;<>")):
            yield from () if separator else (f"{line}: {what}" for what in check_command(list(words)))


CHEAP = (check_links, check_paths, check_python)


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if sys.argv[1:] == ["--test-command"]:
        print(test_command(readme))
        return 0
    wrong = [f"README.md:{what}" for what in check_map(readme)]
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for check in (*CHEAP, check_commands, run_python):
            wrong += [f"{path.relative_to(ROOT)}:{what}" for what in check(path, text)]
    print("\n".join(wrong) or f"{len(documents())} documents agree with the tree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
