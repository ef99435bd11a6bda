"""Answers to questions: windows by hand, recorded losses, the best pair, and a run on a file laid
out as SQuAD is."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs_for_tests import config_of

from data2vec_jax import train
from data2vec_jax.convert import loaded, ours
from data2vec_jax.core.errors import UserError
from data2vec_jax.metrics.writer import FILE, read_lines
from data2vec_jax.modalities.text import windows
from data2vec_jax.models import heads
from data2vec_jax.tasks import answer

GOLDEN = Path(__file__).parent / "goldens/checkpoints/Data2VecTextForQuestionAnswering"


def test_recorded_loss_through_the_task():
    with np.load(GOLDEN / "golden.npz") as file:
        golden = {key: file[key] for key in file.files}
    checkpoint = loaded.load(GOLDEN)
    model, head = ours.model_of(checkpoint.config), heads.make(checkpoint.config["head"])
    batch = {
        "tokens": jnp.asarray(golden["in_nomask/input_ids"], jnp.int32),
        "start": jnp.asarray(golden["in_nomask/start_positions"].reshape(-1), jnp.int32),
        "end": jnp.asarray(golden["in_nomask/end_positions"].reshape(-1), jnp.int32),
    }
    loss = jax.jit(lambda p: answer.make_loss(model, head)(p, {}, batch, None)[:2])
    total, count = loss(checkpoint.params)
    np.testing.assert_allclose(total / count, golden["nomask/loss"], rtol=1e-4)


class Words:
    """A tokenizer of words."""

    bos, pad, eos, vocab_size = 0, 1, 2, 4_000

    def encode(self, text, literal=False):
        return [10 + len(word) for word in text.split()]

    def encode_with_offsets(self, text):
        spans, start = [], 0
        for word in text.split():
            start = text.index(word, start)
            spans.append((start, start + len(word)))
            start += len(word)
        return self.encode(text), spans


ITEM = {
    "text": "a bb ccc dddd eeeee ffffff g hh",
    "question": "what is it",
    "answers": ["dddd eeeee"],
    "starts": [9],
    "id": "q",
}


def test_windows_overlap_and_know_their_answer():
    found = windows.windows(ITEM, Words(), windows.WindowConfig(length=11, stride=2, question=2))
    # <s> two words </s></s> five words </s>: from 0, 2 and 4 (which reaches the end).
    assert [row[5:-1] for row, _ in found] == [
        [11, 12, 13, 14, 15],
        [13, 14, 15, 16, 11],
        [15, 16, 11, 12],
    ]
    for row, spans in found:
        assert row[:5] == [0, 14, 12, 2, 2] and row[-1] == 2 and len(spans) == len(row)
        assert (spans[:5] == -1).all() and (spans[-1] == -1).all()
    places = [windows.place_of(ITEM, spans) for _, spans in found]
    assert places == [(8, 9), (6, 7), (0, 0)]  # in the last one only a part of it
    for (_, spans), (first, last) in list(zip(found, places, strict=True))[:2]:
        assert ITEM["text"][spans[first, 0] : spans[last, 1]] == "dddd eeeee"
    part = ITEM | {"answers": ["ddd eee"], "starts": [10]}  # whole tokens that touch it
    assert windows.place_of(part, found[0][1]) == (8, 9)
    with pytest.raises(UserError, match="1 to 6"):
        windows.WindowConfig(length=20, question=10, stride=7)


def test_the_best_pair_equals_exhaustive_search():
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts, ends = rng.normal(size=(2, 25))
        allowed = rng.random(25) < 0.7
        pairs = [
            (starts[a] + ends[b], a, b)
            for a, b in itertools.product(range(25), repeat=2)
            if allowed[a] and allowed[b] and a <= b < a + 4
        ]
        found = answer.best_span(starts, ends, allowed, top=25, longest=4)
        assert found == max(pairs)
    score, *_ = answer.best_span(starts, ends, np.zeros(25, bool))
    assert score == float("-inf")


def squad_file(path, count):
    """Colours of things, in the layout of SQuAD."""
    colours = ("red", "green", "blue", "white")
    paragraphs = []
    for i in range(count):
        text = f"The house number {i} is {colours[i % 4]} and the door of it is new ."
        answers = [{"text": colours[i % 4], "answer_start": text.index(colours[i % 4])}]
        qa = {"id": f"q{i}", "question": "Which colour has the house ?", "answers": answers}
        paragraphs.append({"context": text, "qas": [qa]})
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]})
    )


def test_a_small_network_learns_to_answer(tmp_path):
    squad_file(tmp_path / "train-v1.1.json", 64)
    squad_file(tmp_path / "dev-v1.1.json", 16)
    config = config_of("finetune_squad", "base")
    config.update(total_steps=40, log_every=10, eval_every=0, dtype="float32")
    config.model.update(width=32, vocab_size=330, max_length=64, dropout=0.0)
    config.model.encoder = dict(depth=1, heads=4, mlp=64, norm="post")
    config.model_overrides = {}
    config.examples.update(length=48, stride=16, question=16, vocab_size=330)
    config.data.update(source=f"squad:{tmp_path}", batch_size=16, workers=0)
    config.schedule.peak = 1e-2
    train.train(config.to_dict(), tmp_path / "run", verbose=False)
    lines = read_lines(tmp_path / "run" / FILE)
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0] / 3
    (line,) = [line for line in lines if line["split"] == "dev"]
    assert line["exact"] > 0.9 and line["f1"] >= line["exact"]
