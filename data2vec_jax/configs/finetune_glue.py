"""Fine-tuning on the eight tasks of GLUE, each with its metrics; STS-B is a regression.

    python -m data2vec_jax.train --config=finetune_glue:rte --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=glue:/data/glue/RTE

Variants: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte; with ",v2" the rate of data2vec 2.0.
PRETRAINED: a workdir, or what `python -m data2vec_jax.convert ... --to=jax` wrote. The paper has
the median of five seeds: `--config.seed=0` to 4, then `python -m data2vec_jax.evaluate DIR0 ...`.
Numbers: the authors' config/text (roberta/config/finetuning).
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common

# Folder, rows of a batch, warm-up and all updates, learning rate of 1.0 (2.0: twice, RTE the same),
# classes, metrics.
TASKS = {
    "cola": ("CoLA", 16, 320, 5_336, 1e-5, 2, ("matthews",)),
    "sst2": ("SST-2", 32, 1_256, 20_935, 1e-5, 2, ("accuracy",)),
    "mrpc": ("MRPC", 16, 137, 2_296, 1e-5, 2, ("accuracy", "f1")),
    "stsb": ("STS-B", 16, 214, 3_598, 2e-5, 1, ("pearson", "spearman")),
    "qqp": ("QQP", 32, 28_318, 113_272, 1e-5, 2, ("accuracy", "f1")),
    "mnli": ("MNLI", 32, 7_432, 123_873, 1e-5, 3, ("accuracy",)),
    "qnli": ("QNLI", 32, 1_986, 33_112, 1e-5, 2, ("accuracy",)),
    "rte": ("RTE", 16, 122, 2_036, 2e-5, 2, ("accuracy",)),
}


def get_config(variant: str = "cola") -> ConfigDict:
    name, _, version = variant.partition(",")
    if name not in TASKS or version not in ("", "v2"):
        raise ValueError(f"no variant '{variant}'; choose from {', '.join(TASKS)}")
    folder, rows, warmup, steps, peak, classes, metrics = TASKS[name]
    c = common.finetuning(
        task="classify",
        modality="text",
        steps=steps,
        eval_every=steps // 10,
    )
    c.model = common.roberta_base()  # from scratch; --init_from brings its own
    c.model_overrides = dict(encoder=dict(dropout=0.1, attention_dropout=0.1))
    c.head = dict(name="sequence", classes=classes, dropout=0.0)
    c.examples = dict(
        lengths=(64, 128, 512), tokenizer=config_dict.placeholder(str), vocab_size=50_265
    )
    # All batches have the same number of rows, whatever their length.
    c.data.update(
        source=f"glue:/data/glue/{folder}",
        split="train",
        eval_split="dev",
        batch_size=rows,
        rows_multiple_of=rows,
        workers=4,
        share=1.0,
        equal_rows=True,
    )
    if name == "mnli":
        c.data.eval_split = "dev_matched,dev_mismatched"
    c.loss = dict(scale=0.2 if name == "stsb" else 1.0)  # scores from 0 to 5 become 0 to 1
    c.scoring = dict(metrics=metrics)
    if version == "v2" and name != "rte":
        peak *= 2
    c.schedule = dict(kind="linear", peak=peak, warmup=warmup / steps)
    c.optim = dict(betas=(0.9, 0.98), eps=1e-6, eps_on="raw", weight_decay=0.1)
    return c
