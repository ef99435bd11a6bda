"""What recipes have in common: skeletons, sections without numbers of a paper, demo networks."""

from typing import Any

from ml_collections import ConfigDict, config_dict


def pretraining(*, modality: str, steps: int, averaged: tuple[str, ...], seed: int) -> ConfigDict:
    """A pretraining config without its recipe. averaged: the teacher's own parameters."""
    c = _run(modality=modality, steps=steps, seed=seed)
    c.averaged = averaged
    c.checkpoint = dict(every=5_000, keep=2, keep_every=100_000)
    return c


def finetuning(
    *, task: str, modality: str, steps: int, eval_every: int, seed: int = 0
) -> ConfigDict:
    """A fine-tuning config without its recipe."""
    c = _run(modality=modality, steps=steps, seed=seed)
    c.update(task=task, eval_every=eval_every)
    c.adapter = dict(targets=(), rank=8, alpha=16.0, dora=False, rank_stabilised=False, dropout=0.0)
    c.checkpoint = dict(every=1_000, keep=1)
    return c


def _run(*, modality: str, steps: int, seed: int) -> ConfigDict:
    c = ConfigDict(dict(modality=modality, seed=seed, total_steps=steps))
    c.update(log_every=100, eval_every=0, accumulate=1, dtype="bfloat16")
    c.mesh = dict(data=-1, fsdp=1, slices=config_dict.placeholder(int))
    return c


def roberta_base() -> dict[str, Any]:
    """Section `model` of text: RoBERTa-base, which data2vec has too."""
    return dict(
        width=768,
        vocab_size=50_265,
        max_length=512,
        dropout=0.1,
        encoder=dict(
            depth=12,
            heads=12,
            mlp=3072,
            norm="post",
            dropout=0.1,
            attention_dropout=0.1,
            remat="none",
        ),
    )


def short_run(c: ConfigDict, updates: int) -> None:
    """The schedule of a run of a few hundred or thousand updates: T of them, width D.

    Decay: the time constant 1 / (1 - decay) of the teacher grows from T / 100, but at least 50
    updates, to T / 5 at half of the run. Rate: 1 / D, which at D = 768 is a little more than the
    papers' 1e-3. docs/small_scale.md has the runs that these were chosen by.
    Raises ValueError: so few updates that the teacher would still be its random start.
    """
    if updates < 200:
        raise ValueError(f"{updates} updates: a teacher needs 200 to leave its random start behind")
    c.total_steps = updates
    c.ema = dict(start=1 - 1 / max(50, updates / 100), end=1 - 5 / updates, anneal=0.5)
    c.schedule = dict(kind="cosine", peak=round(1 / c.model.width, 5), warmup=0.1)


# The demo's networks, as pretraining and fine-tuning have them -----------------------------------

# Narrow positions: in rows of 99 frames wide ones tell every frame its place, and predicting that
# is a way to a low loss that teaches nothing.
DEMO_SPEECH = dict(
    width=96,
    positions=dict(depth=2, width=10, groups=8),
)
DEMO_VISION = dict(
    width=96,
    image=28,
    patch=4,
    mean=(0.13,),
    std=(0.31,),
    shared_relative=False,
    sincos=True,
    initializer="small",
    encoder=dict(depth=4, heads=4, mlp=192, norm="post", eps=1e-6),
)
DEMO_TEXT = dict(width=192, vocab_size=2_000, max_length=64, scale=True)
DEMO_ENCODER = dict(depth=4, heads=4, mlp=192, norm="post", initializer="small")


def demo_speech(c: ConfigDict) -> None:
    """Makes the model of a fine-tuning config the demo's, as 2.0 has it: with ALiBi."""
    c.model.update(**DEMO_SPEECH, mask_embedding=False)
    c.model.frontend = dict(kind="mel")
    c.model.alibi = dict(scale=1.0, learned=True, per_head=True, per_layer=False)
    c.model.encoder = DEMO_ENCODER
