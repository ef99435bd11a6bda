"""Prose for pretraining out of web pages, a dictionary and package descriptions.

What counts as prose, how texts are cut into documents, and which of them hold a text that must not
be seen in training. `corpora.py` fetches the sources.
"""

import html
import re
from collections.abc import Iterable, Iterator, Sequence

SIZE = 2_000  # characters of a document; a row of training is much shorter
WINDOW = 6  # words by which a held-out text is found


WORD = re.compile(r"[\"'(]*[^\W\d_]+(?:['-][^\W\d_]+)*[\"').,;:!?]*")


def is_prose(paragraph: str, least: int = 5) -> bool:
    """Whether it has `least` words, and symbols and numbers are at most three tenths."""
    tokens = paragraph.split()
    words = sum(WORD.fullmatch(token) is not None for token in tokens)
    return words >= least and words >= 0.7 * len(tokens)


def documents(paragraphs: Iterable[str], size: int = SIZE) -> Iterator[str]:
    """Paragraphs in a row -> documents of at most `size` characters, a paragraph a line.

    A paragraph that is longer itself is cut at ends of sentences, and a sentence between words.
    """
    lines: list[str] = []
    for paragraph in paragraphs:
        for line in fitting(paragraph, size):
            if lines and sum(map(len, lines)) + len(lines) + len(line) > size:
                yield "\n".join(lines)
                lines = []
            lines.append(line)
    if lines:
        yield "\n".join(lines)


def fitting(paragraph: str, size: int) -> Iterator[str]:
    """The paragraph in pieces of at most `size` characters."""
    while len(paragraph) > size:
        ends = [m.start() for m in re.finditer(r"(?<=[.!?]) ", paragraph[: size + 1])]
        cut = ends[-1] if ends else paragraph.rfind(" ", 1, size + 1)
        cut = cut if cut > 0 else size
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip()
    yield paragraph


def distinct(texts: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Texts as paragraphs -> the same without paragraphs that have been before."""
    seen: set[str] = set()
    for text in texts:
        new = [p for p in dict.fromkeys(text) if p not in seen]
        seen.update(new)
        if new:
            yield new


class HeldOut:
    """Texts that must not be seen, found in paragraphs whatever their case and punctuation."""

    def __init__(self, texts: Iterable[str]):
        self.short: set[str] = set()
        self.by_start: dict[tuple[str, ...], list[str]] = {}
        for text in texts:
            words = words_of(text)
            if len(words) < WINDOW:
                self.short.add(" ".join(words))
            else:
                self.by_start.setdefault(tuple(words[:WINDOW]), []).append(" ".join(words))

    def within(self, paragraph: str) -> bool:
        """Whether a text is within it; one of less than WINDOW words must be all of it."""
        words = words_of(paragraph)
        whole = " ".join(words)
        starts = zip(*(words[i:] for i in range(WINDOW)), strict=False)
        found = (text for s in starts if s in self.by_start for text in self.by_start[s])
        return whole in self.short or any(f" {text} " in f" {whole} " for text in found)


def words_of(text: str) -> list[str]:
    """Its words in lower case."""
    return re.findall(r"\w+", text.lower())


def plain(text: str) -> str:
    """On one line, without control characters, with the typewriter's quotation marks."""
    return " ".join(CONTROLS.sub(" ", text.translate(QUOTES)).split())


CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufeff\ufffc\ufffd]")
QUOTES = str.maketrans("“”‘’", "\"\"''")

# Web pages ----------------------------------------------------------------------------------------

NO_PROSE = re.compile(  # and Sphinx's marks beside headings, and signatures of functions
    r"<(script|style|head|pre|nav|footer)\b.*?</\1>|<!--.*?-->"
    r"|<a class=\"headerlink.*?</a>|<dt class=\"sig .*?</dt>",
    re.S,
)
INLINE = re.compile(
    r"</?(?:a|abbr|b|big|cite|code|em|font|i|img|kbd|small|span|strong|sub|sup|tt|u|var)\b[^>]*>"
)
TAG = re.compile(r"</?[a-zA-Z!][^>]*>")


def paragraphs_of_page(page: str) -> list[str]:
    """The prose of a web page; of Sphinx's, of the article alone."""
    page = page[max(0, page.find('itemprop="articleBody"')) :]
    page = INLINE.sub("", NO_PROSE.sub("\n", page))
    found = (plain(html.unescape(part)) for part in TAG.split(page))
    return [paragraph for paragraph in found if is_prose(paragraph)]


# The dictionary -----------------------------------------------------------------------------------

SOURCE = re.compile(r"\[[^\[\]]*(?:Webster|PJC|WordNet|Century|AS|RH|RP)[^\[\]]*\]$")
ACCENTED = re.compile(
    r"\[(?:[^\w\s\[\]]{1,2}([A-Za-z]{1,2})|([A-Za-z]{1,2})[\^~]|([ao]e|[AO]E)|([a-z])(?:mac|um))\]"
)
GARBLED = re.compile(r"\\|\?\?|href|\">")  # Greek that is missing, pronunciations, links


def entries(dictionary: str) -> Iterator[list[str]]:
    """The paragraphs of each entry of GCIDE, without pronunciations, etymologies and marks.

    An entry starts at the margin. Definitions taken from WordNet are left out.
    """
    for entry in re.split(r"\n(?=\S)", dictionary):
        if entry.startswith("00-database"):
            continue
        found = []
        for paragraph in re.split(r"\n\s*\n", entry):
            paragraph = plain(paragraph)
            source = SOURCE.search(paragraph)
            if source and "WordNet" in source[0]:
                continue
            paragraph = definition(paragraph)
            if is_prose(paragraph) and not GARBLED.search(paragraph):
                found.append(paragraph)
        if found:
            yield found


def definition(paragraph: str) -> str:
    """A paragraph of the dictionary as a reader would read it."""
    text = ACCENTED.sub(lambda m: next(filter(None, m.groups())), paragraph)
    text = re.sub(r"\\[^\\]*\\(?: \([^()]*\))?", "", text)  # pronunciations
    for _ in range(2):  # etymologies, which may hold brackets, and remarks
        text = re.sub(r"\s*\[[^\[\]]*\]", "", text)
    text = re.sub(r"\s*--(?:[A-Z][\w.&' ()]*)?$", "", text)  # who is quoted
    text = re.sub(r"[{}]|(?<=\w)[\"`*](?=\w)", "", text)  # references, and stress within words
    return plain(re.sub(r"\s+([,.;:])", r"\1", text))
