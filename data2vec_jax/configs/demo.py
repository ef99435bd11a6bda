"""The demo: small models on the real samples shipped inside, on a laptop's CPU.

    bash launch/local.sh                     # pretrains, probes and reports all three
    python -m data2vec_jax.train --config=demo:speech,v2 --workdir=DIR

Variants: speech, vision, text (data2vec 1.0), and with ",v2" data2vec 2.0; "sound,v2", for a folder
or table of short sounds, as those shipped inside are few (docs/results.md); the baselines
"vision,mae", "vision,simmim", "vision,ijepa", "vision,dino", "vision,byol", "speech,wav2vec2",
"speech,hubert", "text,mlm", each on the network and data of the data2vec that it is compared with
(docs/comparison.md). Sizes and schedules are ours: 2.0 takes two to four minutes of one core. A
teacher must follow a short run fast, so its decay starts at 0.98 or 0.99 rather than 0.999; with
another --config.total_steps=T give --config.ema.end, too: 1 - 5 / T; and below 600 updates
--config.schedule.warmup: 60 / T. docs/small_scale.md has the rule for all of this.
"""

import importlib
from typing import Any

from ml_collections import ConfigDict

from data2vec_jax.configs import common

OF_A_PAPER = False  # so tests/recipes.json has no rows of it


def speech(c: ConfigDict) -> None:
    c.model.update(**common.DEMO_SPEECH, dropout=0.0)
    c.model.frontend = dict(kind="mel")  # minutes of speech are too few to learn a filterbank from
    c.model.encoder.update(dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    c.examples.crops = (2.0,)


def speech_v1(c: ConfigDict) -> None:
    c.model.alibi = None
    c.objective.update(top_k=4, scale="mean")
    common.short_run(c, 1_200)


def speech_v2(c: ConfigDict) -> None:
    c.averaged = ("^(?!decoder/|head/)",)  # the front end, too: it is a part of what is learned
    c.model.decoder.update(layers=2, width=48, groups=1, dropout=0.0)
    # A last norm per frame, as the paper has it in vision: without it what all rows have in common
    # at a place soon explains most of the targets' variance.
    # The output of a block, not of its feed-forward part alone, gained here: docs/small_scale.md.
    c.objective.update(top_k=4, target="block", scale="mean", final_norms=("layer",))
    common.short_run(c, 1_200)


def vision(c: ConfigDict) -> None:
    c.model.update(**common.DEMO_VISION)
    c.model.encoder = common.DEMO_VISION["encoder"]  # and nothing of the paper's
    c.data.batch_size = 32


def vision_v1(c: ConfigDict) -> None:
    c.examples.scale = (0.6, 1.0)
    c.total_steps = 620
    c.mask.count = 20
    c.objective = dict(
        name="data2vec1",
        top_k=4,
        target="ffn",
        layer_norms=("instance",),
        final_norms=("layer",),
        scale="mean",
    )
    c.schedule.peak = 2e-3


def vision_v2(c: ConfigDict) -> None:
    # Nearly whole digits: strong crops, which 1.0 needs here, hold 2.0 back.
    c.examples.update(scale=(0.95, 1.0), aspect=(1.0, 1.0))
    # A decoder that can do little by itself: it leaves the work to the encoder, and is half of the
    # time of a step.
    c.model.decoder.update(layers=2, width=48, groups=1)
    c.objective.update(top_k=4, scale="mean", class_weight=0.0)
    common.short_run(c, 2_000)


def sound(c: ConfigDict) -> None:
    c.model.update(width=96, initializer="small", frames=128, mean=-10.1, std=5.1)
    c.examples.update(frames=128, min_samples=1_600)


def sound_v2(c: ConfigDict) -> None:
    c.model.decoder.update(layers=2, width=48, groups=1)
    # Norms over a clip's patches, as EAT has them, remove what is the same in all of the clip, and
    # with it most of what tells one sound from another; so the norms are over the batch.
    c.objective.update(top_k=4, scale="mean", class_weight=0.0, layer_norms=("batch",))
    c.data.batch_size = 16
    common.short_run(c, 800)
    c.schedule.peak = 3e-3  # at the rule's rate the front end collapses


def text(c: ConfigDict) -> None:
    c.model.update(**common.DEMO_TEXT, dropout=0.0)
    c.model.encoder.update(depth=2, mlp=384, dropout=0.0, attention_dropout=0.0)
    c.examples.vocab_size = 2_000
    c.data.split = "train+extra"


def text_v1(c: ConfigDict) -> None:
    c.total_steps = 480
    c.objective = dict(
        name="data2vec1", top_k=2, target="ffn", layer_norms=("instance",), scale="mean"
    )
    c.data.batch_size = 32


def text_v2(c: ConfigDict) -> None:
    c.model.decoder.update(layers=2, width=48, groups=1, kernel=5, dropout=0.0)
    c.model.head.hidden = 192
    c.objective.update(top_k=2, scale=1 / 192)
    common.short_run(c, 600)
    c.schedule.peak = 4e-3  # at twice the rule's rate it collapses
    c.examples.update(lengths=(16, 32), mode="complete_doc")
    c.data.batch_size = 48


# Of 1.0 and 2.0 alike, but for the learned mask of 1.0, and ALiBi, which speech has in 2.0 alone.
NETWORKS = {"speech": speech, "vision": vision, "sound": sound, "text": text}
RECIPES = (speech_v1, vision_v1, text_v1, speech_v2, vision_v2, sound_v2, text_v2)
CHANGES = {f.__name__: f for f in RECIPES}

# The data2vec that a baseline is compared with, and what its head has here: as little as 2.0's.
SMALL = dict(width=48, depth=2, heads=4, mlp=96)
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "vision_mae": ("vision,v2", dict(decoder=SMALL)),
    "vision_simmim": ("vision,v1", {}),
    "vision_ijepa": ("vision,v2", dict(predictor=SMALL)),
    "vision_dino": ("vision,v2", dict(outputs=1_024, hidden=192, size=64)),
    "vision_byol": ("vision,v2", dict(hidden=384, size=64)),
    "speech_wav2vec2": ("speech,v1", dict(quantiser=dict(codes=64, code_size=96, size=96))),
    "speech_hubert": ("speech,v1", dict(clusters=32, size=96)),
    "text_mlm": ("text,v1", {}),
}


def get_config(variant: str = "vision") -> ConfigDict:
    modality, _, version = variant.partition(",")
    name = f"{modality}_{version or 'v1'}"
    if name not in CHANGES | BASELINES:
        choices = ", ".join(name.replace("_", ",") for name in CHANGES | BASELINES)
        raise ValueError(f"no variant '{variant}'; choose from {choices}")
    recipe = importlib.import_module(f"data2vec_jax.configs.{name}")
    if name in BASELINES:
        beside, sizes = BASELINES[name]
        c = get_config(beside)
        recipe.like(c)
        c.objective.update(sizes)
        if "labels" in c.examples:  # shipped, as the speech is
            c.examples.labels = "samples"
        return c
    c = recipe.get_config("smoke")
    c.log_every = 10
    c.checkpoint = dict(every=200, keep=1)
    c.collapse = dict(warn_after=100)
    c.ema.update(start=0.99, end=0.999, anneal=1.0)
    c.schedule = dict(kind="cosine", peak=1e-3, warmup=0.1)
    c.model.encoder.update(common.DEMO_ENCODER)
    NETWORKS[modality](c)
    CHANGES[name](c)
    return c
