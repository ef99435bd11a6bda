"""wav2vec 2.0 on speech, beside data2vec.

    python -m data2vec_jax.train --config=speech_wav2vec2:like --workdir=DIR \
        --config.data.source=manifest:/data/librispeech/train.tsv

Variants: like (everything but targets and loss is `speech_v1:base`), paper (the authors' recipe of
the base model), smoke (4 steps on the speech shipped inside). Numbers: baselines spec 4.
"""

from ml_collections import ConfigDict

from data2vec_jax.configs import common, speech_v1

OF_A_PAPER = False  # of data2vec: tests/test_speech_baselines.py has its numbers


def like(c: ConfigDict) -> None:
    """Makes a config of data2vec 1.0 wav2vec 2.0's."""
    common.without_teacher(c, "wav2vec2")


def get_config(variant: str = "like") -> ConfigDict:
    c = common.beside(speech_v1, variant)
    like(c)
    if variant == "paper":
        common.wav2vec2_base(c)
        # The mean share of the authors' spans is .49, before they cut rows to the smallest count of
        # a batch.
        c.mask = dict(kind="spans", prob=0.65, width=10, min_masks=2, masked=0.45)
        c.data.batch_size = 352  # 92 minutes of audio; theirs are at most 93, 64 x 1.4 M samples
    elif variant == "smoke":
        c.objective.quantiser = dict(codes=16, code_size=32, size=32)
        c.objective.negatives = 20
    return c
