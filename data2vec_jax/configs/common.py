"""What recipes have in common: skeletons, sections without numbers of a paper, demo networks."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict


def pretraining(*, modality: str, steps: int, averaged: tuple[str, ...], seed: int) -> ConfigDict:
    """A pretraining config without its recipe. averaged: the teacher's own parameters."""
    c = _run(modality=modality, steps=steps, seed=seed)
    c.averaged = averaged
    c.checkpoint = dict(every=5_000, keep=2, keep_every=100_000)
    return c


def beside(recipe: Any, variant: str, base: str = "base") -> ConfigDict:
    """What a baseline's variant 'like', 'paper' or 'smoke' starts from: the variant `base` of the
    data2vec recipe (a module), or its smoke. Raises ValueError: no such variant."""
    if variant not in ("like", "paper", "smoke"):
        raise ValueError(f"no variant '{variant}'; choose from like, paper, smoke")
    return recipe.get_config("smoke" if variant == "smoke" else base)


def without_teacher(c: ConfigDict, name: str, **options: Any) -> None:
    """Gives a pretraining config another objective, one that has no teacher."""
    for section in ("averaged", "ema"):
        if section in c:
            del c[section]
    c.objective = dict(name=name, **options)
    c.collapse = dict(min_pred_std=0.0)  # targets stay, and first predictions are a constant


def of_views(c: ConfigDict, name: str) -> None:
    """Gives a pretraining config of images an objective that compares views and masks nothing.
    Blurs are in proportion to the image of this config; DINO's and BYOL's are of 224 pixels."""
    c.objective = dict(name=name)
    c.mask = {}
    del c.model["decoder"], c.model["head"]
    c.model.mask_embedding = False
    radius = (0.1 * c.examples.image / 224, 2.0 * c.examples.image / 224)
    c.examples.update(aspect=(3 / 4, 4 / 3), views=dict(radius=radius))


def wav2vec2_base(c: ConfigDict) -> None:
    """Makes model, crops and rate of `speech_v1` those of wav2vec 2.0 base, which are HuBERT's too
    (baselines spec 4 and 5)."""
    c.model.frontend = dict(norm="group", gradient=0.1)
    c.model.positions = dict(depth=1, kernel=128, groups=16, norm="weight", initializer="wav2vec2")
    c.model.feature_dropout = 0.1
    c.examples.crops = (2.0, 4.0, 8.0, 12.0, 15.625)  # theirs: the shortest row of a batch
    c.data.rows_multiple_of = 16
    c.schedule = dict(kind="linear", peak=5e-4, warmup=32_000 / 400_000)


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
    c.data = dict(max_bad_share=0.01)
    c.mesh = dict(data=-1)
    c.mesh.update(fsdp=config_dict.placeholder(int), slices=config_dict.placeholder(int))
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
            remat="auto",
        ),
    )


# Short runs ---------------------------------------------------------------------------------------

LARGEST_SIDE = 3  # of a kept block: 2.0's in vision

# Kind of mask -> (clones, mask) of data2vec 2.0. Clones are half of the papers'. Masks of grids are
# those of the papers' base models; of frames they mask half in spans of 5, and of tokens, in longer
# rows, .48. docs/small_scale.md has what was tried.
# A kept block's width depends on the grid: see `block_side`.
SHORT_RUN_MASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "inverse_blocks": (8, dict(ratio=0.8, adjust=0.07)),
    "block_spans": (4, dict(ratio=0.333, adjust=0.05, width=2)),
    "independent": (4, dict(ratio=0.3)),
}


def short_run(
    c: ConfigDict, updates: int, *, side: int | None = None, ema_end: float | None = None
) -> None:
    """Sets up a run of a few hundred or thousand updates: T of them, width D.

    Decay: the time constant 1 / (1 - decay) of the teacher grows from T / 100, but at least 50
    updates, to T / 5 at half of the run. Rate: 1 / D, which at D = 768 is a little more than the
    papers' 1e-3, after a warm-up of T / 10, but at least 60 updates. Clones and masks of 2.0:
    `SHORT_RUN_MASKS`; 1.0, and masks of other kinds, stay as they are. docs/small_scale.md has the
    runs that these were chosen by, and says what was not swept.

    side, ema_end: a kept block's side (`block_side`) and the decay's end, if not the rule's.
    Raises ValueError: too few updates for the teacher to leave its random start behind, or a block
    larger than what is kept. Options of the command line come later and are not checked.
    """
    if updates < 200:
        raise ValueError(f"{updates} updates: a teacher needs 200 to leave its random start behind")
    decay = short_decay(updates) | ({} if ema_end is None else {"end": ema_end})
    end = decay["end"]
    if (1 - end) * updates < 2:
        raise ValueError(
            f"a decay of {end}: its time constant is more than half of {updates:,} updates, and "
            f"the teacher keeps its random start; the rule ends at {1 - 5 / updates:.5f}"
        )
    c.total_steps = updates
    c.ema = decay
    c.schedule = dict(
        kind="cosine", peak=round(1 / c.model.width, 5), warmup=max(0.1, 60 / updates)
    )
    if c.objective.name == "data2vec2" and c.mask.kind in SHORT_RUN_MASKS:
        c.objective.clones, mask = SHORT_RUN_MASKS[c.mask.kind]
        if c.mask.kind == "inverse_blocks":
            mask = mask | dict(width=block_side(_grid(c.model), side, **mask))
        c.mask.update(mask)


def short_decay(updates: int) -> dict[str, float]:
    """Section `ema` of a short run, see `short_run`."""
    return dict(start=1 - 1 / max(50, updates / 100), end=1 - 5 / updates, anneal=0.5)


def from_scratch(config: Mapping[str, Any]) -> dict[str, float]:
    """Options with which a fine-tuning config trains a network from scratch: slow first blocks
    keep what they have learned before, which is nothing."""
    return {"layerwise_lr.decay": 1.0} if config.get("layerwise_lr") else {}


def block_side(
    grid: tuple[int, int], side: int | None = None, *, ratio: float, adjust: float
) -> int:
    """The side, in patches, of the square blocks that `masking.inverse_blocks` keeps on a grid.

    The largest up to `LARGEST_SIDE` of which one square is no more than the kept part, and all that
    are drawn are no less: where they are less, the rest of the kept part is single patches. Or
    `side`, if it is given, and one square is no more than the kept part.
    Raises ValueError: a square is more, so that no square would be kept whole.
    """
    rows, columns = grid
    patches, share = rows * columns, 1 - ratio
    kept = int(patches * share)  # rounded as the mask is, here and below

    def filled(side: int) -> bool:
        squares = int(patches * ((share + adjust) / side**2))
        return side**2 <= kept <= squares * side**2

    if side is None:
        side = next(filter(filled, range(LARGEST_SIDE, 0, -1)), 1)
    if side**2 > kept:
        raise ValueError(
            f"a block of {side} x {side} patches, but {kept} of {rows} x {columns} are kept "
            f"(ratio={ratio}): use a smaller block, or smaller patches"
        )
    return side


def _grid(model: ConfigDict) -> tuple[int, int]:
    """Patches of a section `model`: of an image, or of a spectrogram with 128 mel bins."""
    if "frames" in model:
        return model.frames // 16, 128 // 16
    pairs = ((x, x) if isinstance(x, int) else x for x in (model.image, model.patch))
    return tuple(pixels // patch for pixels, patch in zip(*pairs, strict=True))


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
