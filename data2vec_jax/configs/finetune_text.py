"""Fine-tuning for a class of a text, or of a pair: any table with columns text and label.

    python -m data2vec_jax.train --config=finetune_text:dora --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=ag_news:/data/ag_news

Variants: base (all parameters), lora, dora (adapters and head alone), the recipe of AG News; demo,
demo_lora, demo_dora (a minute on a CPU, on the glosses shipped inside; start from a run of
configs/demo.py:text or :text,v2), smoke. PRETRAINED: a workdir, or what
`python -m data2vec_jax.convert ... --to=jax` wrote. Data of your own:
--config.data.source='manifest:/data/{split}.csv' --config.head.classes=N, where the first line of
the table names its columns: text, label, and pair if there is one.
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common

VARIANTS = ("base", "lora", "dora", "demo", "demo_lora", "demo_dora", "smoke")


def get_config(variant: str = "base") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"no variant '{variant}'; choose from {', '.join(VARIANTS)}")
    steps = 3 * 120_000 // 32  # epochs, texts, rows of a batch
    c = common.finetuning(
        task="classify",
        modality="text",
        steps=steps,
        eval_every=steps // 3,
    )
    c.model = common.roberta_base()  # from scratch; --init_from brings its own
    c.model_overrides = dict(encoder=dict(dropout=0.1, attention_dropout=0.1))
    c.head = dict(name="sequence", classes=4, dropout=0.0)
    c.examples = dict(
        lengths=(64, 128, 256), tokenizer=config_dict.placeholder(str), vocab_size=50_265
    )
    c.data.update(
        source="ag_news:/data/ag_news",
        split="train",
        eval_split="test",
        batch_size=32,
        rows_multiple_of=8,
        share=1.0,
        workers=4,
        key=config_dict.placeholder(str),
    )
    c.loss = dict(smoothing=0.0)
    c.scoring = dict(metrics=("accuracy", "macro_f1"))
    c.schedule = dict(kind="linear", peak=2e-5, warmup=0.06)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)

    size, _, adapter = variant.rpartition("_")
    adapter = adapter if adapter in ("lora", "dora") else None
    if variant == "smoke" or "demo" in (size, variant):
        _small(c)
    if adapter:
        c.adapter.update(targets=("blocks/",), dora=adapter == "dora")
        # Small matrices that start at nothing; the demo's rate is high as it is.
        c.schedule.peak *= 3 if "demo" in size else 10
        c.optim.weight_decay = 0.0
    if variant == "smoke":
        c.update(total_steps=4, log_every=1, eval_every=0)
        c.model.width = 32
        c.model.encoder.update(depth=2, mlp=64)
        c.data.update(batch_size=8, share=0.05)
    return c


def _small(c: ConfigDict) -> None:
    """The network of configs/demo.py:text, on the glosses."""
    c.update(total_steps=300, log_every=10, eval_every=100, dtype="float32")
    c.model.update(**common.DEMO_TEXT)
    c.model.encoder = common.DEMO_ENCODER | dict(depth=2, mlp=384)
    c.head.classes = 45
    c.examples.update(lengths=(16, 32, 64), vocab_size=2_000)
    c.data.update(source="samples:glosses", batch_size=32, workers=0)
    c.schedule.update(peak=1e-3, warmup=0.1)
    c.checkpoint.every = 100
