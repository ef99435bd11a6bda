"""The corpora for small runs: what is held out, what counts as prose, how texts are cut."""

import importlib

import pytest

corpora = importlib.import_module("corpora")
prose = importlib.import_module("prose")


def test_what_is_held_out_does_not_depend_on_the_rest():
    names = [f"name{i}" for i in range(4_000)]
    splits = [corpora.held_out(name) for name in names]
    assert splits.count("test") / len(names) == pytest.approx(0.2, abs=0.02)
    assert splits.count("dev") / len(names) == pytest.approx(0.08, abs=0.01)
    assert splits[:6] == ["dev", "train", "test", "train", "train", "train"]


def test_a_table_without_dev_is_made_again(tmp_path):
    for name in ("table.tsv", "table.csv"):
        table = tmp_path / name
        corpora.write(table, ("text", "split"), [("dev", "train"), ("b", "test")])
        assert not corpora.has_dev(table)
        corpora.write(table, ("text", "split"), [("a", "train"), ("b", "dev")])
        assert corpora.has_dev(table)


def test_documents_hold_whole_paragraphs():
    found = list(prose.documents(["aaaa", "bbbb", "cccc", "d"], size=9))
    assert found == ["aaaa\nbbbb", "cccc\nd"]


def test_a_long_paragraph_is_cut_at_sentences_then_at_words():
    text = "One. Two three. Four five six seven"
    assert list(prose.documents([text], size=16)) == ["One. Two three.", "Four five six", "seven"]
    assert list(prose.documents(["x" * 12], size=5)) == ["xxxxx", "xxxxx", "xx"]


def test_symbols_and_lists_of_names_are_no_prose():
    assert prose.is_prose('The 2 (other) readers\' lock-free lists, e.g. "RCU".')
    assert not prose.is_prose("drm_a drm_b() struct drm_c foo->bar 0x1f")
    assert not prose.is_prose("Return value")


def test_prose_of_a_page_is_without_code_and_navigation():
    page = """<nav><p>Home and five more words here</p></nav><div itemprop="articleBody">
      <h1>Kernel locks and how they are used<a class="headerlink" href="#x">¶</a></h1>
      <dt class="sig sig-object c">int a_function_of(struct of many words)</dt>
      <p>A <b>lock</b> is held\nby &quot;one&quot; writer.</p><pre>take this lock and hold it</pre>
      </div>"""
    found = prose.paragraphs_of_page(page)
    assert found == ["Kernel locks and how they are used", 'A lock is held by "one" writer.']


def test_entries_of_the_dictionary_read_as_prose():
    text = (
        "R[^a]le \\R[^a]le\\ (r[aum]l), n. [F. r[^a]le, Gr. ??? noise.] (Med.)\n"
        "   A noise; the {sound} of a cough. [Obs.] --Shak.\n   [1913 Webster]\n\n"
        "   2. What a dictionary of our time says of it.\n   [WordNet 1.5]\n\n"
        "Rhomb \\Rhomb\\, n.\n   See {Coak}.\n   [1913 Webster]\n"
    )
    assert list(prose.entries(text)) == [["Rale, n. (Med.) A noise; the sound of a cough."]]


def test_held_out_texts_are_found_within_others():
    held = prose.HeldOut(["a small dog with very long ears", "a dog"])
    assert held.within("(Zool.) A small dog, with very long ears; a beagle.")
    assert held.within("A dog.") and not held.within("a dog of the house")
    assert not held.within("a small dog with very long earsand")


def test_no_paragraph_twice():
    assert list(prose.distinct([["a", "b", "a"], ["b"], ["c", "b"]])) == [["a", "b"], ["c"]]


def test_names_of_spoken_lines():
    script = 'dialogId("m-1", "font_small", "It\'s \\"so\\".")\ndialogStr("Je to tak.")\n\n'
    script += 'dialogId("m-2", "font_big", "Not spoken.")\ndialogStr("")\n'
    assert corpora.DIALOG.findall(script) == ["m-1"]
