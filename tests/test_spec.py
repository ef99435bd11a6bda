"""Citations of the specification, such as `spec 2.4` or `trap 14`, name sections that exist."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "docs/spec"

# What stands before "spec" or "trap", and the page that it names.
PAGES = {
    "": "pretraining",
    "pretraining": "pretraining",
    "conversion": "finetuning_and_conversion",
    "sound": "sound",
    "baselines": "baselines",
    "extensions": "extensions",
    "small-scale": "small_scale",
}

FOLDERS = ("data2vec_jax", "tests", "configs", "launch")
ENDINGS = {".py", ".md", ".json", ".sh", ".ipynb"}

GAP = r"(?:\s|#)+"  # also the end of a line of a comment
NUMBER = r"\d+(?:\.\d+)?"
PREFIX = rf"(?:\b({'|'.join(filter(None, PAGES))}){GAP})?"
SECTIONS = re.compile(
    rf"{PREFIX}\bspec{GAP}({NUMBER}(?:(?:,|{GAP}and|{GAP}to){GAP}\d+\.\d+)*)", re.IGNORECASE
)
TRAPS = re.compile(rf"{PREFIX}\btraps?{GAP}(\d+|\([a-z]\))", re.IGNORECASE)
# `docs/spec/pretraining.md` 2.4, and: section 6 of `docs/spec/pretraining.md`
PATHS = re.compile(rf"\bspec/(\w+)(?:\.md)?`?(?:{GAP}(?:section{GAP})?({NUMBER}))?")
SECTION_OF = re.compile(rf"\bsection{GAP}({NUMBER}){GAP}of{GAP}`?(?:docs/)?spec/(\w+)", re.I)


class Citation(NamedTuple):
    """The page and the number that a text names; `trap`: an item of the page's list of traps."""

    page: str
    number: str
    trap: bool
    at: int  # offset in the text


def citations(text: str) -> list[Citation]:
    """All citations of a text. A page that is named without a number has the number ''."""
    found = []
    for match in SECTIONS.finditer(text):
        page = PAGES[(match[1] or "").lower()]
        found += [Citation(page, n, False, match.start()) for n in re.findall(NUMBER, match[2])]
    for match in TRAPS.finditer(text):
        found.append(Citation(PAGES[(match[1] or "").lower()], match[2], True, match.start()))
    for match in PATHS.finditer(text):
        found.append(Citation(match[1], match[2] or "", False, match.start()))
    for match in SECTION_OF.finditer(text):
        found.append(Citation(match[2], match[1], False, match.start()))
    return found


def headings(page: str) -> set[str]:
    """Numbers of the sections of a page: {'1', '1.1', ...}."""
    return set(re.findall(rf"^#+ ({NUMBER})\.? ", (SPEC / f"{page}.md").read_text(), re.MULTILINE))


def traps(page: str) -> set[str]:
    """Numbers, or letters in brackets, of the items of the section 'Traps' of a page."""
    text = (SPEC / f"{page}.md").read_text()
    section = re.search(r"^## \d+\. Traps$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return (
        set(re.findall(r"^(?:- )?(\d+(?=\.)|\([a-z]\)) ?", section[1], re.M)) if section else set()
    )


def missing(text: str) -> list[tuple[int, str]]:
    """Line and description of each citation that leads nowhere."""
    wrong = []
    for page, number, trap, at in citations(text):
        if not (SPEC / f"{page}.md").is_file():
            reason = f"no page {page}.md"
        elif number and number not in (traps(page) if trap else headings(page)):
            reason = f"{page}.md has no {'trap' if trap else 'section'} {number}"
        else:
            continue
        wrong.append((text.count("\n", 0, at) + 1, reason))
    return wrong


def texts() -> list[Path]:
    """Files that may cite the specification."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            recorded = "goldens" in path.parts and path.suffix != ".md"
            if path.suffix in ENDINGS and path.is_file() and not recorded:
                found.append(path)
    return [path for path in found if path != Path(__file__).resolve()]


def test_citations_name_sections_that_exist():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {reason}"
        for path in texts()
        for line, reason in missing(path.read_text())
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_code_cites_the_specification():
    """Otherwise the test above compares nothing."""
    cited = {c[:3] for path in texts() for c in citations(path.read_text())}
    assert len(cited) >= 30
    assert {page for page, _, _ in cited} >= {"pretraining", "finetuning_and_conversion"}
    assert any(trap for _, _, trap in cited)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(spec 2.4)", [("pretraining", "2.4", False)]),
        ("Spec 9.1, 9.2.", [("pretraining", "9.1", False), ("pretraining", "9.2", False)]),
        ("spec 2.1, 2.2 and 3.2", [("pretraining", n, False) for n in ("2.1", "2.2", "3.2")]),
        ("spec 11, trap 14", [("pretraining", "11", False), ("pretraining", "14", True)]),
        ("conversion spec\n    # 4.5", [("finetuning_and_conversion", "4.5", False)]),
        ("sound trap (g)", [("sound", "(g)", True)]),
        ("`docs/spec/sound.md` 2", [("sound", "2", False)]),
        ("section 6 of `docs/spec/pretraining.md`", [("pretraining", "6", False)]),
        ("importlib.util.find_spec 3, PartitionSpec 2", []),
    ],
)
def test_what_a_citation_is(text, expected):
    found = {(page, number, trap) for page, number, trap, _ in citations(text) if number}
    assert found == set(expected)


@pytest.mark.parametrize(
    "text",
    ["spec 2.99", "trap 99", "conversion spec 6.1", "sound trap (z)", "spec/nothing.md", "spec 77"],
)
def test_a_citation_that_leads_nowhere_is_found(text):
    assert missing(f"first line\n{text}\n") and missing(f"first line\n{text}\n")[0][0] == 2


def test_pages_refer_to_their_own_sections():
    """'section 4.5' in a page is a section of that page; '[sound.md](sound.md) 7' is of another."""
    wrong = []
    for path in sorted(SPEC.glob("*.md")):
        text = path.read_text()
        other = re.findall(rf"\]\((\w+)\.md\),?{GAP}(trap{GAP})?({NUMBER})", text)
        numbers = [(path.stem, "", n) for n in re.findall(rf"\bsections?{GAP}({NUMBER})", text)]
        for page, trap, number in other + (numbers if path.stem != "README" else []):
            if number not in (traps(page) if trap else headings(page)):
                wrong.append(f"{path.name}: {page}.md has no {trap or 'section '}{number}")
    assert not wrong, "\n".join(wrong)


def test_the_index_names_pages_and_files_that_exist():
    text = (SPEC / "README.md").read_text()
    pages = set(re.findall(r"\]\((\w+\.md)\)", text))
    assert pages == {path.name for path in SPEC.glob("*.md")} - {"README.md"}
    named = re.findall(r"`((?:data2vec_jax|tests)/[\w./]+)`", text)
    assert named and not [name for name in named if not (ROOT / name).exists()]
