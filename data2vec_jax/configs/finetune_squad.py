"""Fine-tuning for answers to questions about a text: SQuAD 1.1, and XQuAD without its languages.

    python -m data2vec_jax.train --config=configs/finetune_squad.py:base --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=squad:/data/squad

Variants: base, large (its rate). PRETRAINED: a workdir, or what
`python -m data2vec_jax.convert ... --to=jax` wrote; its tokenizer must tell where tokens stand (a
byte-level BPE, or sentencepiece without normalisation). Another language:
python -m data2vec_jax.evaluate DIR --set data.eval_source=squad:/data/xquad.{split}.json \
    data.eval_split=de
Numbers: RoBERTa's; data2vec was not evaluated on these sets.
"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "large"):
        raise ValueError(f"no variant '{variant}'; choose from base, large")
    steps = 3 * 88_000 // 48  # epochs, windows of 384 tokens, rows of a batch
    c = ConfigDict(
        dict(
            task="answer", modality="text", seed=0, total_steps=steps, log_every=100,
            eval_every=steps // 3, accumulate=1, dtype="bfloat16",
        )
    )  # fmt: skip
    c.model = dict(  # from scratch; --init_from brings its own
        width=768, vocab_size=50_265, max_length=512, dropout=0.1,
        encoder=dict(
            depth=12, heads=12, mlp=3072, norm="post", dropout=0.1, attention_dropout=0.1,
            remat="none",
        ),
    )  # fmt: skip
    if variant == "large":
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
    c.model_overrides = dict(encoder=dict(dropout=0.1, attention_dropout=0.1))
    c.head = dict(name="answer")
    c.examples = dict(
        length=384, stride=128, question=64, tokenizer=config_dict.placeholder(str),
        vocab_size=50_265,
    )  # fmt: skip
    c.data = dict(
        source="squad:/data/squad", split="train", eval_split="dev", batch_size=48, workers=4,
        share=1.0, eval_source=config_dict.placeholder(str),
    )  # fmt: skip
    c.scoring = dict(top=20, longest=30)
    c.adapter = dict(
        targets=(), rank=8, alpha=16.0, dora=False, rank_stabilised=False, dropout=0.0
    )  # fmt: skip
    c.schedule = dict(kind="linear", peak=3e-5 if variant == "base" else 1.5e-5, warmup=0.06)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    c.mesh = dict(data=-1, fsdp=1, slices=config_dict.placeholder(int))
    c.checkpoint = dict(every=1_000, keep=1)
    return c
