"""launch/demo.py: what it prints and writes, of a pretraining of two steps."""

import json

import pytest
from configs_for_tests import module_of

from data2vec_jax.tasks import probe


@pytest.fixture(scope="module")
def demo():
    return module_of("launch/demo.py")


def entry(demo, hand_made, seeds, untrained=3):
    """An entry of summary.json as `run_variant` returns it."""

    def result(score):
        blocks = {"linear_probe": "block 3", "knn": "front end"}
        dev = {name: {"block 3": score} for name in probe.PROBES}
        return {"linear_probe": score, "knn": score / 2, "blocks": blocks, "dev": dev}

    before = [result(0.5 + 0.01 * i) for i in range(untrained)]
    found = probe.compared(before, [result(s) for s in seeds], hand_made and result(hand_made))
    numbers = dict.fromkeys((*demo.FINAL, "seconds", "probe_seconds"), 1.5)
    return {"data": "digits", "hand_made": hand_made and "pixels"} | found | numbers


def test_table_and_sentence_of_one_seed(demo):
    found = {"vision_v2": entry(demo, 0.879, [0.891])}
    said = demo.table(found)
    lines = [line.split("  ") for line in said.splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert lines[0][-5:] == ["probe", "hand-made", "untrained", "pretrained", "from"]
    better = "better than hand-made features"
    spread = "51.0 % (50.0 to 52.0)"
    assert lines[1][-6:] == ["linear probe", "87.9 %", spread, "89.1 %", "block 3", better]
    assert lines[2][0] == "k-NN" and lines[2][-2] == "front end"
    assert demo.sentence(*found.popitem()) == (
        "digits: pixels 87.9, untrained 51.0, pretrained 89.1 (block 3): " + better
    )


@pytest.mark.parametrize(
    ("hand_made", "seeds", "ending"),
    [
        (0.7, [0.8, 0.6], "pretrained 70.0 (block 3): better than untrained only"),
        (0.7, [0.8, 0.4], "pretrained 60.0 (block 3): no gain"),
        (None, [0.8], "digits: untrained 51.0, pretrained 80.0 (block 3): better than untrained"),
    ],
)
def test_sentences(demo, hand_made, seeds, ending):
    found = entry(demo, hand_made, seeds)
    assert demo.sentence("vision_v2", found).endswith(ending)
    assert ("70.0 %  " in demo.table({"vision_v2": found})) == (hand_made is not None)
    assert demo.sentence("vision", found).startswith("digits (1.0): ")


def test_a_short_demo_writes_all_numbers(demo, tmp_path, monkeypatch, capsys):
    """Pretraining of two steps; the summary has all names, and the page shows them."""
    parse = demo.parse

    def short(words):
        return parse([*words, "--config.total_steps=2", "--config.log_every=1"])

    monkeypatch.setattr(demo, "parse", short)
    monkeypatch.setitem(demo.LABELS, "vision", 200)
    monkeypatch.setattr("sys.argv", ["demo", "--modalities=vision", f"--workdir={tmp_path}"])
    demo.main()
    (item,) = json.loads((tmp_path / "summary.json").read_text()).items()
    name, found = item
    assert name == "vision_v2" and found["data"] == "digits" and found["hand_made"] == "pixels"
    for key in probe.PROBES:
        scores = found[key]
        assert len(scores["untrained"]) == 3 and len(scores["pretrained"]) == 1
        assert 0.5 < scores["hand_made"] < 1
        assert found["verdict"][key] == probe.verdict(**scores)
        assert found["blocks"][key]["pretrained"][0] in found["dev"][key]["pretrained"]
    assert found["block"] == found["blocks"]["linear_probe"]["pretrained"][0]
    assert 0 < found["probe_seconds"] < found["seconds"]
    assert set(demo.FINAL) < set(found)
    assert demo.sentence(*item) in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert (
        "pixels" in text and found["verdict"]["knn"] in text and "linear probe over blocks" in text
    )
    assert "pixels:" in (tmp_path / "probes.svg").read_text()
