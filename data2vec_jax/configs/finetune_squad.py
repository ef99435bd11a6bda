"""Fine-tuning for answers to questions about a text: SQuAD 1.1, and XQuAD without its languages.

    python -m data2vec_jax.train --config=finetune_squad:base --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=squad:/data/squad

Variants: base, large (its rate). PRETRAINED: a workdir, or what
`python -m data2vec_jax.convert ... --to=jax` wrote; its tokenizer must tell where tokens stand (a
byte-level BPE, or sentencepiece without normalisation). Another language:
python -m data2vec_jax.evaluate DIR --set data.eval_source=squad:/data/xquad.{split}.json \
    data.eval_split=de
Numbers: RoBERTa's; data2vec was not evaluated on these sets.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "large"):
        raise ValueError(f"no variant '{variant}'; choose from base, large")
    steps = 3 * 88_000 // 48  # epochs, windows of 384 tokens, rows of a batch
    c = common.finetuning(
        task="answer",
        modality="text",
        steps=steps,
        eval_every=steps // 3,
    )
    c.model = common.roberta_base()  # from scratch; --init_from brings its own
    if variant == "large":
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
    c.model_overrides = dict(encoder=dict(dropout=0.1, attention_dropout=0.1))
    c.head = dict(name="answer")
    c.examples = dict(
        length=384,
        stride=128,
        question=64,
        tokenizer=config_dict.placeholder(str),
        vocab_size=50_265,
    )
    c.data.update(
        source="squad:/data/squad",
        split="train",
        eval_split="dev",
        batch_size=48,
        workers=4,
        share=1.0,
        eval_source=config_dict.placeholder(str),
    )
    c.scoring = dict(top=20, longest=30)
    c.schedule = dict(kind="linear", peak=3e-5 if variant == "base" else 1.5e-5, warmup=0.06)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    return c
