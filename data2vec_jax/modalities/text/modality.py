"""Text: token ids. Masks change the input: chosen tokens become `<mask>`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from data2vec_jax import masking
from data2vec_jax.modalities.contract import Drawing, HandMade, Modality
from data2vec_jax.modalities.text import data, export, inference, inputs, model, published
from data2vec_jax.modalities.text.bench import BENCH
from data2vec_jax.modalities.text.codec import CODEC
from data2vec_jax.modalities.text.data import SPECIAL
from data2vec_jax.modalities.text.learned import LEARNED


def corrupt(
    net: Any, batch: Mapping[str, jax.Array], mask: jax.Array, draw: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Puts `<mask>` at the chosen tokens, or a random token, or nothing (BERT's 80/10/10).

    mask bool [B, T]: chosen tokens. Returns the student's batch, the teacher's batch, and the
    positions that show `<mask>`: the loss is there and nowhere else (spec 4.6, trap 3).

    The teacher sees the whole text. With `teacher_sees='targets'` it sees the chosen tokens only,
    their positions closed up: the authors' code gives it the targets of the loss, which are
    padding everywhere else (trap 2).
    """
    keep_prob, replace_prob = net.keep_prob, net.replace_prob
    last = net.embeddings.vocab_size - 1
    tokens = whole = batch["tokens"]
    if net.teacher_sees == "targets":
        whole = jnp.where(mask, whole, net.embeddings.pad)
    if keep_prob or replace_prob:
        step = jax.random.fold_in(draw.mask_key, draw.step)

        def one(example, chosen):
            # One more than `masking.sample` folds in, so that these draws are independent of it.
            key = jax.random.fold_in(jax.random.fold_in(step, example), 1 << 16)
            roles, words = jax.random.split(key)
            roles = masking.bert_roles(roles, chosen, keep_prob, replace_prob)
            return roles, jax.random.randint(words, chosen.shape, SPECIAL, last)

        roles, words = jax.vmap(one)(batch["example_id"], mask)
        tokens = jnp.where(roles == masking.REPLACE, words, tokens)
        mask = roles == masking.MASK
    visible = jnp.where(mask, last, tokens)
    return {**batch, "tokens": visible}, {**batch, "tokens": whole}, mask


MODALITY = Modality(
    name="text",
    codec=CODEC,
    model=model.TextConfig,
    layout=data.BlockConfig,
    examples=data.TextExamples,
    labelled=data.labelled,
    hand_made=HandMade("TF-IDF", data.tf_idf),
    drawing=Drawing(words=data.words),
    input_layout=inputs.RowConfig,
    inputs=inputs.Rows,
    flops=model.flops,
    published_scores=published.published_scores,
    inference=inference.INFERENCE,
    write_processor=export.write_processor,
    corrupt=corrupt,
    learned=LEARNED,
    bench=BENCH,
)
