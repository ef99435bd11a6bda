"""Fine-tuning for speech recognition by CTC on characters, with little and much of LibriSpeech.

    python -m data2vec_jax.train --config=finetune_librispeech:10h --workdir=DIR \
        --init_from=PRETRAINED --config.data.source=librispeech:/data

Variants: 10m, 1h, 10h, 100h, 960h (base); with ",large" the large ones; demo (minutes on a CPU, on
the Russian speech shipped inside; start from a run of configs/demo.py:speech or :speech,v2; it
shows the way, but learns little more than blanks in that time), smoke.
PRETRAINED: a workdir, or what `python -m data2vec_jax.convert ... --to=jax` wrote. With a 4-gram of
words: --config.scoring.lm=4-gram.arpa.gz and the weights of the paper for the split.
Numbers: base_*.yaml and vox_*.yaml of the authors (config/finetuning of wav2vec 2.0).
"""

from ml_collections import ConfigDict, config_dict

from data2vec_jax.configs import common

# Updates, peak rate, share of masked frames and channels (before spans overlap), layerdrop, updates
# of the head alone, how often an example is in an epoch.
BASE = {
    "10m": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000, 32),
    "1h": (13_000, 5e-5, 0.65, 0.25, 0.1, 10_000, 8),
    "10h": (20_000, 5e-5, 0.65, 0.5, 0.05, 10_000, 1),
    "100h": (80_000, 3e-5, 0.65, 0.5, 0.1, 0, 1),
    "960h": (320_000, 1e-4, 0.5, 0.1, 0.1, 0, 1),
}
LARGE = {
    "10m": (13_000, 1e-4, 0.65, 0.25, 0.1, 10_000, 32),
    "1h": (13_000, 3e-4, 0.75, 0.25, 0.1, 10_000, 8),
    "10h": (20_000, 1e-4, 0.75, 0.25, 0.1, 10_000, 1),
    "100h": (80_000, 3e-5, 0.5, 0.5, 0.1, 10_000, 1),
    "960h": (320_000, 3e-5, 0.5, 0.25, 0.1, 10_000, 1),
}
RUSSIAN = "ОЕАИНТСРЛВКМДПУЯЫЬГЗБЧЙХЖШЮЦЩЭФЁЪ"


def get_config(variant: str = "10h") -> ConfigDict:
    split, _, size = variant.partition(",")
    small = variant in ("demo", "smoke")
    if not small and (split not in BASE or size not in ("", "large")):
        raise ValueError(f"no variant '{variant}'; choose from {', '.join(BASE)}, demo, smoke")
    recipe = (LARGE if size else BASE)["10h" if small else split]
    steps, peak, time, channel, layerdrop, freeze, repeat = recipe
    c = common.finetuning(
        task="transcribe",
        modality="speech",
        steps=steps,
        eval_every=steps // 20,
        seed=1,
    )
    c.characters = "ETAONIHSRDLUMWCFGYPBVK'XJQZ"
    c.model = dict(  # from scratch; --init_from brings its own
        width=768,
        dropout=0.0,
        positions=dict(depth=5, width=95, groups=16),
        encoder=dict(depth=12, heads=12, mlp=3072, norm="post", remat="auto"),
    )
    if size:
        c.model.width = 1024
        c.model.encoder.update(depth=24, heads=16, mlp=4096)
    c.model_overrides = dict(dropout=0.0, frontend=dict(gradient=0.0))
    c.model_overrides.encoder = dict(
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, layerdrop=layerdrop
    )
    c.head = dict(name="ctc", vocab_size=32, blank=0)
    c.examples = dict(seconds=(5.0, 10.0, 14.0, 17.0, 36.0), cut=False, overlap=4.0)
    # 1,600 s of audio a batch (3.2 M samples x 2 GPUs x 4); 48 rows of 36 s are 1,728 s, a part of
    # which is padding.
    c.data.update(
        source="librispeech:/data",
        split="10h" if small else split,
        eval_split="dev-other",
        batch_size=56 if size and split == "960h" else 48,
        rows_multiple_of=8,
        repeat=repeat,
        share=1.0,
        workers=8,
    )
    c.loss = dict(
        time_prob=time,
        time_width=10,
        channel_prob=channel,
        channel_width=64,
        freeze_updates=freeze,
    )
    c.scoring = dict(lm=config_dict.placeholder(str), lm_weight=2.0, word_score=-1.0)
    c.scoring.update(lexicon=config_dict.placeholder(str), beam=50, unit="word")
    c.schedule = dict(kind="tri_stage", peak=peak, warmup=0.1, hold=0.4, decay=0.5, end_scale=0.05)
    # The convolutions stay as they were pretrained; the norm and the projection after them learn.
    c.optim = dict(betas=(0.9, 0.98), eps=1e-8, eps_on="raw", weight_decay=0.0)
    c.optim.frozen = (r"^frontend/(conv\d+/|norm\d+/|time_norm/)",)
    if small:
        _small(c, variant)
    return c


def _small(c: ConfigDict, variant: str) -> None:
    """The network of configs/demo.py:speech, on 14 minutes of Russian."""
    c.update(total_steps=300, log_every=10, eval_every=100, dtype="float32", characters=RUSSIAN)
    common.demo_speech(c)
    c.model_overrides.frontend.gradient = 1.0  # the demo's pretraining is short: all of it learns
    c.model_overrides.encoder.update(activation_dropout=0.0, layerdrop=0.0)
    c.head.vocab_size = 5 + len(RUSSIAN)
    c.examples.update(seconds=(10.0,), overlap=2.0)
    c.data.update(
        source="samples:speech", split="train", eval_split="test", batch_size=8, workers=0
    )
    # Without masks and at half the rate of the others: else a thousand updates end in blanks only.
    c.loss.update(time_prob=0.0, channel_prob=0.0, freeze_updates=0)
    c.schedule.update(peak=1e-3)
    c.optim.frozen = ()
    c.checkpoint.every = 100
    if variant == "smoke":
        c.update(total_steps=4, log_every=1, eval_every=0)
        c.model.width = 32
        c.model.frontend = dict(convs=((16, 10, 5), *((16, 3, 2),) * 4, *((16, 2, 2),) * 2))
        c.model.encoder.update(depth=2, mlp=64)
        c.loss.freeze_updates = 2
