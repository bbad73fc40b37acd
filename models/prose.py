"""Collects a corpus of English prose from libraries that are installed: docstrings, comments and help pages."""

import ast
import hashlib
import html.parser
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
SITE = Path(sysconfig.get_path("purelib"))
HELD_OUT = 64
"""One document in so many is held out, chosen by the hash of its content."""
SEPARATOR = "\n%\n"
"""Between the documents of a file, as between fortunes."""

Report = Callable[[str], None]
Scope = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


# Collecting: from files to raw texts


@dataclass(frozen=True, slots=True)
class Source:
    """A tree of files under one licence."""

    name: str
    release: str
    licence: str
    root: Path

    def files(self) -> list[Path]:
        """The files to read, in an order that does not depend on the file system."""
        skipped = {"site-packages", "_vendor", "vendored_templates", "lib-dynload"}
        found = (path for path in self.root.rglob("*") if path.suffix in READERS and path.is_file())
        return sorted(path for path in found if skipped.isdisjoint(path.relative_to(self.root).parts))


def sources() -> list[Source]:
    """The standard library first: where two texts nearly agree, the first one stays."""
    python = Source("Python standard library", sys.version.split()[0], "PSF-2.0", STDLIB)
    packages = {
        "torch": "BSD-3-Clause",
        "numpy": "BSD-3-Clause",
        "networkx": "BSD-3-Clause",
        "sympy": "BSD-3-Clause",
        "transformers": "Apache-2.0",
        "huggingface_hub": "Apache-2.0",
    }
    return [python] + [Source(name, version(name), licence, SITE / name) for name, licence in packages.items()]


def python_texts(source: str) -> Iterator[str]:
    """The docstrings and whole-line comments of a module, from top to bottom."""
    found = [(scope.body[0].lineno, text) for scope in scopes(ast.parse(source)) if (text := ast.get_docstring(scope))]
    line, position = 1, 0
    for block in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.MULTILINE):
        line, position = line + source.count("\n", position, block.start()), block.start()
        found.append((line, re.sub(r"^[ \t]*#+[:!]? ?", "", block[0], flags=re.MULTILINE)))
    return (text for _, text in sorted(found))


def scopes(node: ast.AST) -> Iterator[Scope]:
    """The module, classes and functions among a node and its statements."""
    if isinstance(node, Scope):
        yield node
    for field in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, field, []):
            yield from scopes(statement)


def topic_texts(source: str) -> Iterator[str]:
    """The pages of `help()`, which pydoc keeps as one dictionary literal."""
    assignment = ast.parse(source).body[0]
    assert isinstance(assignment, ast.Assign)
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return (topics[name] for name in sorted(topics))


class PageText(html.parser.HTMLParser):
    """The running text of an HTML page; blocks end with a blank line."""

    blocks = frozenset({"p", "li", "dd", "dt", "div", "h1", "h2", "h3"})
    unread = frozenset({"pre", "script", "style"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.depth = "", 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.unread
        self.text += "\n\n" if tag in self.blocks else ""

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.unread
        self.text += "\n\n" if tag in self.blocks else ""

    def handle_data(self, data: str) -> None:
        self.text += data if self.depth == 0 else ""


READERS: dict[str, Callable[[str], Iterable[str]]] = {
    ".py": python_texts,
    ".html": lambda source: [PageText(source).text],
    ".txt": lambda source: [source],
}


def texts(path: Path) -> Iterable[str]:
    """The raw texts of a file; none when it is not UTF-8 or not Python, as some of the standard library's tests are."""
    try:
        source = path.read_text(encoding="utf-8")
        return topic_texts(source) if path.parts[-2:] == ("pydoc_data", "topics.py") else READERS[path.suffix](source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return []


# Cleaning: from raw texts to documents of prose

RULE = re.compile(r"[\s=\-*~^#_+.`\"'|/\\]*")
ITEM = re.compile(
    r"\s*(?:(?:[-*+•]|\d+[.)]|\(?[a-z0-9]\)|\.\. ?\w+::) +"  # a bullet, a number, a directive
    r"|:\w+[^:]*:(?: +|$)"  # :param name:
    r"|\w+(?: \([^)]*\))?(?:: +(?=[A-Z])|:$))"  # name (type): Description
)
MARKUP = (
    (re.compile(r":(?:[a-z]+:)?[a-z]+:`[~!]?([^`<]*?)(?:\s*<[^>]*>)?`"), r"\1"),  # :role:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^>]*>`__?"), r"\1"),  # `text <target>`_
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](target)
    (re.compile(r"`+([^`]*)`+_?"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"\s+"), " "),
)
CODE = re.compile(r">>>|::|[=!+<>-]=|->|=>|<-|\|\||&&|\\|[{}<>|~^$@]|\) ?=|\w=\w|https?://|[-.]{3,}|\.\. ")
WORD = re.compile(r"[\"'(\[]*(?:[A-Z]?[a-z]+|[A-Z]+|I|a)(?:['-][a-z]+)*[\"')\]]*[.,;:!?]*[\"')]*")
COMMON = re.compile(
    r"a|all|an|and|any|are|as|at|be|been|but|by|can|do|does|for|from|has|have|if|in|into|is|it|its|may|more|must|no|not|of"
    r"|on|one|only|or|same|should|so|some|than|that|the|their|then|there|they|this|to|use|used|was|we|when|which|will|with"
    r"|would|you",
    re.IGNORECASE,
)


def paragraphs(text: str) -> Iterator[str]:
    """Blocks of lines of one indentation, unwrapped and without markup; list items stand alone, without bullets."""
    block: list[str] = []
    depth = 0
    for line in [*text.expandtabs(4).split("\n"), ""]:
        indent = len(line) - len(line.lstrip())
        blank, item = RULE.fullmatch(line) is not None, ITEM.match(line) is not None
        hanging = len(block) == 1 and ITEM.match(block[0]) is not None
        if block and (blank or item or (indent != depth and not hanging)):
            yield unwrapped(block)
            block = []
        if not blank:
            block.append(line)
        depth = indent


def unwrapped(lines: list[str]) -> str:
    item = ITEM.match(lines[0])
    joined = " ".join([lines[0][item.end() if item else 0 :], *(line.strip() for line in lines[1:])])
    for pattern, replacement in MARKUP:
        joined = pattern.sub(replacement, joined)
    return joined.strip()


def is_prose(paragraph: str) -> bool:
    """Whole sentences of ordinary words: no code, tables, signatures, headings or lead-ins to something dropped."""
    words = paragraph.split(" ")
    if not 6 <= len(words) <= 200 or not paragraph.isascii() or CODE.search(paragraph):
        return False
    if not re.match(r"[\"'(]?[A-Z]", paragraph) or not re.search(r"[.!?][\"')]*$", paragraph):
        return False
    if paragraph.count("(") != paragraph.count(")") or paragraph.count('"') % 2:
        return False
    ordinary = sum(WORD.fullmatch(word) is not None for word in words)
    common = sum(COMMON.fullmatch(word.strip(".,;:()\"'")) is not None for word in words)
    return ordinary >= 0.8 * len(words) and common >= 0.2 * len(words)


class Novelty:
    """Remembers every run of five words, to tell a paragraph from a near copy of an earlier one."""

    def __init__(self) -> None:
        self.runs: set[int] = set()

    def admits(self, paragraph: str) -> bool:
        """Whether at least half of the paragraph is new; if so it is remembered."""
        words = re.findall(r"[a-z]+", paragraph.lower())
        runs = {hash(tuple(words[i : i + 5])) for i in range(max(1, len(words) - 4))}
        fresh = len(runs - self.runs) * 2 >= len(runs)
        if fresh:
            self.runs |= runs
        return fresh


@dataclass(frozen=True, slots=True)
class Document:
    """Consecutive paragraphs of one file, at most about as long as the context."""

    source: Source
    text: str

    @property
    def held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8]) % HELD_OUT == 0


def documents(source: Source, novelty: Novelty, size: int = 1_000) -> Iterator[Document]:
    for path in source.files():
        page = ""
        for text in texts(path):
            for paragraph in paragraphs(text):
                if not is_prose(paragraph) or not novelty.admits(paragraph):
                    continue
                if page and len(page) + len(paragraph) > size:
                    yield Document(source, page)
                    page = ""
                page += ("\n\n" if page else "") + paragraph
        if page:
            yield Document(source, page)


def collect(report: Report) -> list[Document]:
    """Every document of every source, in a fixed order."""
    warnings.simplefilter("ignore", SyntaxWarning)  # from parsing what is read
    corpus: list[Document] = []
    novelty = Novelty()
    for source in sources():
        found = list(documents(source, novelty))
        size = sum(len(document.text) for document in found)
        report(f"{source.name} {source.release}: {len(found):,} documents, {size / 1e6:.2f} MB")
        corpus += found
    return corpus


def digest(corpus: list[Document]) -> str:
    return hashlib.sha256("\0".join(document.text for document in corpus).encode()).hexdigest()


def joined(texts: Iterable[str]) -> str:
    """One file of many texts; `split(SEPARATOR)` undoes it, up to the last newline."""
    return SEPARATOR.join(texts) + "\n"
