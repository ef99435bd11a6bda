"""Files of many texts: documents in order, and what `prepare` makes of them."""

import bz2

from test_prepare import opened, prepare, refused, texts

from data2vec_jax.data.sources import open_source
from data2vec_jax.modalities.text.codec import CODEC as TEXT


def test_lines_and_paragraphs(tmp_path):
    data = "\ufeffOne\u2028line.  \nTwo, Straße.\r\n\n\n  Three.\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    prepare("text", f"lines:{tmp_path}/a.txt", tmp_path / "lines")
    assert texts(tmp_path / "lines") == ["One\u2028line.", "Two, Straße.", "Three."]
    prepare("text", f"paragraphs:{tmp_path}/a.txt", tmp_path / "paragraphs")
    assert texts(tmp_path / "paragraphs") == ["One\u2028line.\nTwo, Straße.", "Three."]
    source = open_source(f"paragraphs:{tmp_path}/a.txt", codec=TEXT)
    assert source[1]["text"] == "Three." and source.location(1).endswith("a.txt:5")
    options = f"lines:{tmp_path}/a.txt", tmp_path / "twice", "--splits=train,dev"
    refused("dev has the examples of train", prepare, "text", *options)
    (tmp_path / "b.txt").write_bytes(data + b"\xff\xfe\n")
    manifest = prepare("text", f"lines:{tmp_path}/b.txt", tmp_path / "b", "--max_bad_share=0.5")
    assert manifest["splits"]["train"] == {"examples": 3, "length": 0, "bad": {"unreadable": 1}}


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en">
<siteinfo><sitename>Wikipedia</sitename></siteinfo>
<page><title>Sea</title><ns>0</ns><id>7</id><revision><id>9</id><text bytes="1">{{Infobox|a={{b|c}}
|d=e}}
'''The sea''' is [[water|salt water]]&lt;ref name="x"&gt;A {{cite}}.&lt;/ref&gt; of the
[[Earth]]s &amp;amp; more.&lt;!-- no --&gt;
[[File:sea.jpg|thumb|The [[coast|shore]] of it]]
== History ==
{| class="wikitable"
|-
| a cell
|}
* First [https://example.org a site].
[[Category:Seas]]</text></revision></page>
<page><title>Talk:Sea</title><ns>1</ns><id>8</id><revision><text>Talk.</text></revision></page>
<page><title>Ocean</title><ns>0</ns><id>10</id><redirect title="Sea" />
<revision><text>#REDIRECT [[Sea]]</text></revision></page>
<page><title>Salt</title><ns>0</ns><id>11</id><revision>
<text>Salt is a mineral.</text></revision></page>
</mediawiki>"""


def test_a_dump_of_wikipedia(tmp_path):
    (tmp_path / "x-pages-articles.xml.bz2").write_bytes(bz2.compress(DUMP.encode()))
    source = f"wikipedia:{tmp_path}/x-pages-articles.xml.bz2"
    prepare("text", source, tmp_path / "out")
    sea = "The sea is salt water of the\nEarths & more.\nHistory\nFirst a site."
    assert texts(tmp_path / "out") == [sea, "Salt is a mineral."]
    item = opened(tmp_path / "out", codec=TEXT)[0]
    assert (item["title"], item["id"]) == ("Sea", "7")
    (tmp_path / "cut.xml").write_text(DUMP[:-40])
    refused("unreadable text", prepare, "text", f"wikipedia:{tmp_path}/cut.xml", tmp_path / "cut")
