"""The handbook: links lead somewhere, every page can be reached, both READMEs show the same code."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
KINDS = {"added", "changed", "fixed", "removed", "performance", "contract"}

_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def pages() -> list[Path]:
    skipped = {"build", "dist", "node_modules"}
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(
            part in skipped or (part.startswith(".") and part != ".github") for part in path.relative_to(ROOT).parts
        )
    ]


def without_code(path: Path) -> str:
    """The page without fences and inline code; code inside a link's text stays, so that the link is seen."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text).replace("`", "")


def relative_links(path: Path) -> list[str]:
    links = [match.group(1) for match in _LINK.finditer(without_code(path))]
    return [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:", link)]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*$", _FENCE.sub("", path.read_text(encoding="utf-8")), re.M):
        text = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).lower()
        kept = "".join(c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        anchor = base = kept.replace(" ", "-")
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in relative_links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(link)
    assert not broken, f"{page.relative_to(ROOT)}: {broken}"


def test_every_page_can_be_reached_from_the_index() -> None:
    reached: set[Path] = set()
    todo = [DOCS / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or not page.exists():
            continue
        reached.add(page)
        for link in relative_links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            target = target / "README.md" if target.is_dir() else target
            if target.suffix == ".md" and target.is_relative_to(DOCS):
                todo.append(target)
    lost = [str(path.relative_to(ROOT)) for path in pages() if path.is_relative_to(DOCS)]
    lost = [name for name in lost if ROOT / name not in reached]
    assert not lost, f"name these in docs/README.md: {lost}"


def test_both_readmes_show_the_same_code() -> None:
    def blocks(name: str) -> list[str]:
        return [match.group() for match in _FENCE.finditer((ROOT / name).read_text(encoding="utf-8"))]

    assert blocks("README.md") == blocks("README.zh-CN.md")


def test_both_readmes_have_the_same_shape() -> None:
    def shape(name: str) -> list[int]:
        text = _FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
        return [len(marks) for marks in re.findall(r"^(#{1,6})\s", text, re.M)]

    assert shape("README.md") == shape("README.zh-CN.md")


def test_fragments_are_named_as_they_must() -> None:
    for path in (ROOT / "changelog.d").iterdir():
        if path.name != "README.md":
            assert re.fullmatch(rf"\+?[\w-]+\.({'|'.join(sorted(KINDS))})(\.\d+)?\.md", path.name), path.name
            assert path.read_text(encoding="utf-8").strip(), f"{path.name} is empty"


def test_decision_records_are_numbered_in_a_row_and_listed() -> None:
    records = sorted(path for path in (DOCS / "adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(len(records)))
    index = (DOCS / "adr" / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in records if path.name not in index]
    assert not missing, f"name these in docs/adr/README.md: {missing}"


def test_anchors_are_made_as_github_does(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# The `kv` floor, again\n## Twice\n## Twice\n```\n# no heading\n```\n", encoding="utf-8")
    assert anchors(page) == {"the-kv-floor-again", "twice", "twice-1"}
