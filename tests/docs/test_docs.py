"""No document names what is not there: links, modules and names, files, commands."""

import ast
import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "benchmarks").glob("*.md")]
)

FENCE = re.compile(r"^ *(?P<marks>```+)(?P<info>[^\n]*)\n(?P<text>.*?)^ *(?P=marks)$", re.M | re.S)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.M)
DOTTED = re.compile(r"kvtier(?:\.\w+)+")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".jsonl", ".yml", ".yaml", ".cfg", ".sh")
FOLDERS = ("kvtier", "tests", "benchmarks", "docs")
PLACES = [REPOSITORY, REPOSITORY / "kvtier"]


def prose(text):
    """Return a document without its fenced blocks."""
    return FENCE.sub("", text)


def fences(text, language):
    return [found["text"] for found in FENCE.finditer(text) if found["info"].split(" ")[0] == language]


def printed_files(text):
    """Return the names of the files that a document prints."""
    return set(re.findall(r"^```\w* file=(\S+)$", text, re.M))


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


def broken_links(document, text):
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, part = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists():
            yield f"{target}: no such file"
        elif part and path.suffix == ".md" and part not in map(anchor, HEADING.findall(prose(path.read_text()))):
            yield f"{target}: no such heading"


def exists_in_source(name):
    """Return whether a name is in its module's file, for modules that load engines, or cannot be imported here."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = REPOSITORY.joinpath(*parts[:length])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return all(re.search(rf"\b{part}\b", path.read_text()) for part in parts[length:])
    return False


def name_exists(name):
    """Return whether "kvtier.a.b.C.d" is a module, a name in it, or an attribute or field of that."""
    if name.startswith("kvtier.adapters."):
        return exists_in_source(name)
    found, parts = importlib.import_module("kvtier"), name.split(".")[1:]
    for index, part in enumerate(parts):
        if not hasattr(found, part) and hasattr(found, "__path__"):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError as error:
                return not str(error.name).startswith("kvtier") and exists_in_source(name)
        if not hasattr(found, part):
            fields = [vars(kind).get("__annotations__", {}) for kind in getattr(found, "__mro__", ())]
            return index == len(parts) - 1 and any(part in names for names in fields)
        found = getattr(found, part)
    return True


def unknown_names(text):
    for span in CODE.findall(prose(text)):
        for name in DOTTED.findall(span):
            if f"/{name}" not in span and not name.endswith(SUFFIXES) and not name_exists(name):
                yield name
    for block in fences(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvtier":
                yield from (
                    f"{node.module}.{item.name}" for item in node.names if not name_exists(f"{node.module}.{item.name}")
                )
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kvtier":
                yield from () if name_exists(f"kvtier.{node.attr}") else (f"kvtier.{node.attr}",)


def looks_like_path(span):
    if not PATH.fullmatch(span) or (span.startswith(("*", ".")) and "/" not in span):
        return False
    head = span.split("/")[0]
    is_here = "/" in span and any((place / head).is_dir() for place in PLACES)
    return span.endswith(SUFFIXES) or is_here


def missing_files(text):
    names = printed_files(text) | {path.name for path in REPOSITORY.glob("*")}
    for folder in FOLDERS:
        names |= {path.name for path in (REPOSITORY / folder).rglob("*")}
    for span in CODE.findall(prose(text)):
        if not looks_like_path(span):
            continue
        if "/" not in span and span in names:
            continue
        if not any(any(place.glob(span.rstrip("/"))) for place in PLACES):
            yield span


def command_file(name):
    return REPOSITORY / "kvtier" / "cli" / f"{name.replace('-', '_')}.py"


def missing_commands(text):
    commands = [*CODE.findall(prose(text)), *(line for kind in ("sh", "console") for line in lines_of(text, kind))]
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    for command in commands:
        words = command.removeprefix("$ ").split()
        if len(words) < 2 or words[1].startswith("-"):
            continue
        if words[0] == "make" and re.fullmatch(r"[\w-]+", words[1]) and words[1] not in targets:
            yield command
        if words[0] == "kvtier" and not command_file(words[1]).exists():
            yield command


def lines_of(text, language):
    return [line for block in fences(text, language) for line in block.splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(REPOSITORY)) for path in DOCUMENTS])
class TestEveryDocument:
    def test_links_resolve(self, document):
        assert list(broken_links(document, document.read_text())) == []

    def test_names_exist(self, document):
        assert list(unknown_names(document.read_text())) == []

    def test_files_exist(self, document):
        assert list(missing_files(document.read_text())) == []

    def test_commands_exist(self, document):
        assert list(missing_commands(document.read_text())) == []


def test_there_are_documents():
    names = {path.name for path in DOCUMENTS}
    assert {"add-a-tier.md", "glossary.md"} <= names


WRONG = """
# A heading

[here](#a-heading), [gone](nowhere.md), [no part](#another), [far](https://example.org/x)
`kvtier.abc.BlockStore.write`, `kvtier.adapters.torch.make_worker`, `kvtier.adapters.steam.make_worker`,
`kvtier.types.JobResult.job_id`, `kvtier.abc.NoSuchStore`, `kvtier.nothing`,
`kvtier/abc.py`, `stores/slab/`, `kvtier/abd.py`, `stores/tape.py`, `10/20`, `mine.py`, `other.py`, `test_docs.py`
`make test`, `make tea`, `kvtier demo --help`, `kvtier sing`

```python file=mine.py
import kvtier
from kvtier.abc import BlockStore, Missing
kvtier.create_spec, kvtier.destroy_spec
```
"""


def test_these_checks_see_what_is_wrong(tmp_path):
    document = tmp_path / "wrong.md"
    document.write_text(WRONG)
    assert list(broken_links(document, WRONG)) == ["nowhere.md: no such file", "#another: no such heading"]
    assert list(unknown_names(WRONG)) == [
        "kvtier.adapters.steam.make_worker",
        "kvtier.abc.NoSuchStore",
        "kvtier.nothing",
        "kvtier.abc.Missing",
        "kvtier.destroy_spec",
    ]
    assert list(missing_files(WRONG)) == ["kvtier/abd.py", "stores/tape.py", "other.py"]
    assert list(missing_commands(WRONG)) == ["make tea", "kvtier sing"]
