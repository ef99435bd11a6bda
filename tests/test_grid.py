"""The grid on real corpora: how sentences are cut and splits drawn, and what the tables say."""

import importlib

import pytest

from data2vec_jax.core.errors import UserError

corpora = importlib.import_module("corpora")
grid = importlib.import_module("grid")
demo = importlib.import_module("data2vec_jax.configs.demo")


def spoken(*names):
    """Phones of a third of a second each."""
    return [((i + 1) / 3, name) for i, name in enumerate(names)]


def test_a_sentence_is_cut_at_its_pauses():
    """Vowels tell where a pause is: 'в' goes with the word after it, 'ж' with the word before."""
    phones = spoken(
        "pau",
        "a",
        "n",
        "aa",
        "zh",
        "pau",
        "v",
        "d",
        "oo",
        "m",
        "i",
        "pau",
        "s",
        "p",
        "i",
        "t",
        "pau",
    )
    found = corpora.phrases("Она ж, в доме спит.", phones)
    assert [words for *_, words in found] == ["она ж", "в доме", "спит"]
    starts, ends = [x[0] for x in found], [x[1] for x in found]
    assert starts[0] == 0 and starts[1:] == ends[:-1]  # nothing is lost between them
    assert ends == pytest.approx([(5 + 6) / 2 / 3, (11 + 12) / 2 / 3, (16 + 17) / 2 / 3])


def test_short_phrases_are_joined_and_wrong_alignments_left_out():
    phones = spoken("a", "pau", "o", "pau", "u", "n", "n", "pau")
    assert [x[2] for x in corpora.phrases("а о ун", phones)] == ["а о ун"]
    assert corpora.phrases("а о", phones) == []  # another number of vowels


def results_on_digits(scratch, v2):
    """Results of the grid that has run on digits only: the accuracy of each seed."""

    def of(seeds):
        return {"scores": {share: {"accuracy": seeds} for share in ("0.01", "0.1", "1")}}

    return {"digits-scratch": of(scratch), "digits-v2": of(v2)}


def test_bold_is_better_with_every_seed():
    table = grid.table("full", results_on_digits([0.5, 0.6], [0.61, 0.7]))
    assert "| 55.0 (50.0 to 60.0) | not run | **65.5 (61.0 to 70.0)** |" in table
    table = grid.table("full", results_on_digits([0.5, 0.6], [0.6, 0.7]))
    assert "**" not in table
    assert "Debian" not in table  # a task that has not run has no row
    assert grid.errors("wer_lm") and not grid.errors("accuracy")


def test_the_page_holds_the_committed_lines():
    known, page = grid.known(), grid.PAGE.read_text()
    assert {"digits-scratch", "digits-v1", "digits-v2"} <= known.keys()
    for text in (grid.table("full", known), grid.table("short", known), grid.adapters(known)):
        assert text in page


def test_a_line_waits_for_its_pretraining(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "FOLDER", tmp_path)
    monkeypatch.setattr(grid, "RUNS", tmp_path / "runs")
    for name, task in grid.TASKS.items():
        for start in task.starts:
            if (name, start) not in (("digits", "v1"), ("adapters", "dora")):
                (tmp_path / f"{name}-{start}.json").write_text("{}")
    first, lines = grid.missing()
    assert lines == [("digits", "v1"), ("adapters", "dora")]
    assert first == [("digits", "v1"), ("sections", "v2")]
    (tmp_path / "runs/digits/v1").mkdir(parents=True)
    (tmp_path / "runs/digits/v1/done").touch()
    assert grid.missing()[0] == [("sections", "v2")]


@pytest.mark.parametrize("name", grid.TASKS)
def test_configs_of_the_grid_are_complete(name):
    task = grid.TASKS[name]
    for version in ("v1", "v2"):
        grid.configured(f"demo.py:{task.pretrain},{version}", task.pretrain_options)
    grid.configured(task.finetune, task.finetune_options)
    with pytest.raises(UserError, match=r"head\.clases: no such option"):
        grid.configured(task.finetune, {"head.clases": 3})


@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_both_versions_of_the_demo_have_one_network(modality):
    """So that one network from scratch is what both are compared with."""
    old, new = (demo.get_config(f"{modality},{v}").model.to_dict() for v in ("v1", "v2"))
    for only in ("decoder", "head", "teacher_sees", "keep_prob", "replace_prob", "types", "alibi"):
        old.pop(only, None)
        new.pop(only, None)
    assert old == new
