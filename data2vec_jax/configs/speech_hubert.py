"""HuBERT on speech, beside data2vec.

    python -m data2vec_jax.cluster --source=manifest:/data/librispeech/train.tsv --clusters=100 \
        --workdir=LABELS
    python -m data2vec_jax.train --config=speech_hubert:like --workdir=DIR \
        --config.data.source=manifest:/data/librispeech/train.tsv --config.examples.labels=LABELS

That is the first iteration. The second learns 500 clusters of block 6 of its model: see
`data2vec_jax.cluster`, and give --config.objective.clusters=500.

Variants: like (everything but masks, targets and loss is `speech_v1:base`), paper (the authors'
recipe of the base model), smoke (4 steps on the speech shipped inside). Numbers: baselines spec 5.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, speech_v1

OF_A_PAPER = False  # of data2vec: tests/test_speech_baselines.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 1.0 HuBERT's."""
    common.without_teacher(c, "hubert", clusters=100)
    c.examples.labels = "labels"
    # The mean share of the authors' spans is .57; the share here is to it as wav2vec 2.0's to its.
    c.mask = dict(kind="spans", prob=0.8, width=10, min_masks=2, masked=0.52)


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(speech_v1, variant)
    like(c)
    if variant == "paper":
        common.wav2vec2_base(c)
        c.objective.reserved = 4
        c.optim.clip = 10.0
        c.data.batch_size = 176  # 46 minutes of audio; theirs are at most 47, 32 x 1.4 M samples
    elif variant == "smoke":
        c.examples.labels = "samples"
        c.objective.update(clusters=32, size=32)
    return c
