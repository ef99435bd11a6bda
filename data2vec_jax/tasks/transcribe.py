"""Speech recognition by CTC on a pretrained encoder.

B batch, S samples, T frames, D width, U labels of a row, V characters. A batch holds audio [B, S],
length [B] (samples), labels int [B, U] (below 0: none) and example_id [B]; the parameters are the
encoder's and, under `task`, those of a `heads.Ctc`. Conversion spec 1.2 to 1.4.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.core.config import Length, Range
from data2vec_jax.core.errors import ExampleError, UserError
from data2vec_jax.core.task import Task
from data2vec_jax.data import normalise
from data2vec_jax.data.characters import BLANK, SPACE, SPECIALS, Characters
from data2vec_jax.modalities.speech.frontend import make_frontend
from data2vec_jax.models.heads import Ctc, Features
from data2vec_jax.models.layers import wide
from data2vec_jax.models.losses import ctc_losses
from data2vec_jax.tasks import decoding, finetune, ngrams, scores
from data2vec_jax.tasks.specaugment import SpecAugmentConfig, augment

Array = jax.Array

# The front end that stays as it was pretrained: all but the last norm and the projection. For
# `optim.frozen`; `model.frontend.gradient=0` keeps its gradients out of the norm, too.
FRONTEND = r"^frontend/(conv\d+/|norm\d+/|time_norm/)"
FIRST = 64  # transcripts that are looked at where a source does not list them
CONFIG, resolve_config = finetune.FinetuneConfig, finetune.resolve_config


def head_only(params: Mapping[str, Any], step: Array, updates: int) -> dict[str, Any]:
    """`params`, of which all but `task` have no gradient while `step` < `updates`.

    The schedule goes on and Adam counts these steps, as in the authors' half-precision runs.
    """

    def held(x):
        return jnp.where(step < updates, jax.lax.stop_gradient(x), x)

    return {k: v if k == "task" else jax.tree.map(held, v) for k, v in params.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(SpecAugmentConfig):
    """Config section `loss` of speech recognition."""

    # Updates in which the head alone learns, see `head_only`.
    freeze_updates: Annotated[int, Range(0, 2**31 - 1)] = 0


def make_loss(
    model: Any, head: Ctc, config: LossConfig = LossConfig()
) -> Callable[..., tuple[Array, Array, dict[str, Array]]]:
    """A task's loss: (params, teacher, batch, draw) -> (sum over rows, rows, metrics).

    Rows that no alignment fits (fewer frames than labels, a blank between equal ones counted) cost
    nothing and have no gradient; `infeasible` is their share. Without `draw` (None) nothing is
    masked or dropped.
    """

    def loss(params, teacher, batch, draw):
        del teacher
        keys = (None,) * 4
        if draw is not None:
            keys = jax.random.split(draw.noise_key, 4)
            if config.freeze_updates:
                params = head_only(params, draw.step, config.freeze_updates)
        apply = functools.partial(model.apply, {"params": params})
        tokens = apply(batch, keys[0], method="features")
        if draw is not None:
            embedding = params.get("mask_embedding")
            tokens = augment(tokens, embedding, keys[1], draw, batch["example_id"], config)
        encoded = apply(tokens, None, keys[2], method="encode")
        lengths = model.valid_lengths(batch)
        features = Features(encoded.x, lengths=lengths)
        logits = head.apply({"params": params["task"]}, features, keys[3])["logits"]
        if lengths is None:
            lengths = jnp.full(len(logits), logits.shape[1])
        losses = ctc_losses(logits, lengths, batch["labels"], head.blank)
        feasible = jnp.isfinite(losses)
        total = jnp.sum(jnp.where(feasible, losses, 0.0))
        return total, jnp.float32(len(losses)), {"infeasible": jnp.mean(~feasible)}

    return loss


def make_predict(model: Any, head: Ctc) -> Callable[..., dict[str, Array]]:
    """(params, batch) -> logits [B, T, V], and how many frames of each row are valid [B]."""

    def predict(params, batch):
        features = finetune.encode(model, head, params, batch)
        logits = wide(head.apply({"params": params["task"]}, features)["logits"])
        # An utterance shorter than what a frame is made of has none, or less than none.
        return {"logits": logits, "frames": jnp.maximum(features.lengths, 0)}

    return predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Config section `scoring` of speech recognition; see `decoding.Scorer`.

    Of several weights or word scores the best pair of these examples is used, and told.
    """

    lm: str | None = None  # an ARPA file: a beam search beside the best path; None for none
    lm_weight: float | Annotated[Sequence[float], Length()] = 2.0
    word_score: float | Annotated[Sequence[float], Length()] = -1.0
    unit: Literal["word", "character"] = "word"  # of the language model
    lexicon: str | None = None  # a file; None for any word
    beam: Annotated[int, Range(1, 100_000)] = 50


def score(
    predictions: Sequence[Any],
    inputs: Any,
    config: ScoringConfig = ScoringConfig(),
    *,
    characters: Characters,
    step: int,
    normaliser: normalise.Normaliser | None = None,
    max_outside_share: float = 1.0,
) -> dict[str, float]:
    """wer and cer of the best path; with `config.lm`, of a beam search too.

    Utterances that were left out count as empty transcripts, and their share is `left_out`.
    Shares of what the references have lost: `empty_references` are those without a letter of the
    alphabet, `outside` the letters that it lacks. step: samples from frame to frame. normaliser:
    of the references, None for that of the characters. Raises UserError: more than
    `max_outside_share` is outside.
    """
    normaliser = normaliser or normalise.Normaliser(characters.letters)
    if config.lexicon and not config.lm:
        raise UserError("config.scoring.lexicon: it is for a beam search, which needs scoring.lm")
    source = inputs.utterances
    texts = [source.field(i, "transcript") for i in range(len(source))]
    logits, unread = [None] * len(source), set()
    for number in range(len(source)):
        rows = np.flatnonzero(inputs.owner == number)
        parts = [(inputs.starts[i] // step, predictions[i]) for i in rows]
        if all(part is not None for _, part in parts):
            logits[number] = stitch([(at, p["logits"][: p["frames"]]) for at, p in parts])
        elif not isinstance(texts[number], str):
            texts[number] = ""  # it is what cannot be read
            unread.add(number)
    references = [transcript_of(text, normaliser, source.uri) for text in texts]
    survey = normaliser.survey(text for i, text in enumerate(texts) if i not in unread)
    survey.check(f"references of {source.uri}", max_outside_share)
    best = ["" if x is None else decoding.greedy(x[None])[0] for x in logits]
    found = rates(references, [characters.decode(labels) for labels in best])
    lost = {
        "left_out": sum(x is None for x in logits) / len(logits),
        "empty_references": survey.empty / len(logits),
        "outside": survey.share,
    }
    found |= {name: share for name, share in lost.items() if share}
    if config.lm:
        found |= beam_search_scores(logits, references, characters, config)
    return found


def beam_search_scores(
    logits: Sequence[np.ndarray | None],
    references: Sequence[str],
    characters: Characters,
    config: ScoringConfig,
) -> dict[str, float]:
    """wer_lm and cer_lm, and the weights that were chosen if there were several.

    `unknown_words`: the share of the references' words that the language model, or the lexicon,
    does not have.
    """
    found: dict[str, float] = {}
    lm_weight, word_score, beam = config.lm_weight, config.word_score, config.beam
    words = decoding.read_lexicon(config.lexicon, characters) if config.lexicon else None
    model, options = ngrams.read_arpa(config.lm), {"lexicon": words, "unit": config.unit}
    spoken = [word for text in references for word in text.split()]
    known = set(words) if words else model if config.unit == "word" else set(spoken)
    if spoken and (share := sum(word not in known for word in spoken) / len(spoken)):
        found["unknown_words"] = share
    if np.ndim(lm_weight) or np.ndim(word_score):
        pairs = [(x, text) for x, text in zip(logits, references, strict=True) if x is not None]
        _, lm_weight, word_score = decoding.tune(
            *zip(*pairs, strict=True),
            characters,
            model,
            np.atleast_1d(lm_weight).tolist(),
            np.atleast_1d(word_score).tolist(),
            search=functools.partial(decoding.beam_search, beam=beam),
            **options,
        )
        found |= {"lm_weight": lm_weight, "word_score": word_score}
    scorer = decoding.Scorer(
        characters, model, lm_weight=lm_weight, word_score=word_score, **options
    )
    texts = [
        ""
        if x is None
        else decoding.transcript(decoding.beam_search(x, scorer, beam=beam), characters)
        for x in logits
    ]
    return found | {f"{name}_lm": value for name, value in rates(references, texts).items()}


def stitch(parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """Logits [T, V] of an utterance from those of its windows, each with its first frame.

    What two windows share is cut in the middle: at their ends they lack context.
    """
    ends = [at + len(x) for at, x in parts]
    cuts = [(end + at) // 2 for end, (at, _) in zip(ends, parts[1:], strict=False)]
    edges = [parts[0][0], *cuts, ends[-1]]
    return np.concatenate(
        [
            x[first - at : last - at]
            for (at, x), first, last in zip(parts, edges[:-1], edges[1:], strict=True)
        ]
    )


def rates(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Word and character error rates of transcripts."""
    return {"wer": scores.wer(references, texts), "cer": scores.cer(references, texts)}


def characters_of(config: Mapping[str, Any]) -> Characters:
    """Of the config's `characters`; they start with what Hugging Face's and fairseq's have."""
    return Characters((*SPECIALS, SPACE, *config["characters"]))


def normaliser_of(config: Mapping[str, Any]) -> normalise.Normaliser:
    """Of transcripts, references and a language model's text: for a config's `characters`."""
    return normalise.of_config(characters_of(config), config["data"].get("normalise") or {})


def transcript_of(text: Any, normaliser: normalise.Normaliser, uri: str) -> str:
    """A transcript of the alphabet's letters. Raises UserError: there is none."""
    if not isinstance(text, str):
        raise UserError(f"{uri}: its examples have no transcript (a column `transcript`)")
    return normaliser(text)


def check_language_model(
    config: ScoringConfig, normaliser: normalise.Normaliser, most: float
) -> list[str]:
    """What the units of a language model have to do with the alphabet, in a line; none without a
    model. Raises UserError: more than the share `most` of them is not made of its letters.
    """
    if not config.lm:
        return []
    letters = normaliser.letters | ({SPACE} if config.unit == "character" else set())
    units = [unit for unit in ngrams.read_units(config.lm) if unit not in ngrams.SPECIALS]
    outside = [unit for unit in units if not letters.issuperset(unit)]
    share = len(outside) / max(len(units), 1)
    line = f"{config.lm}: {len(units):,} units, {len(outside):,} of other letters ({share:.1%})"
    line += f", the first is '{outside[0]}'" if outside else ""
    if share > most:
        raise UserError(
            f"{line}; config.data.max_outside_share={most:g}, and a search finds none of them: "
            "make one with python -m data2vec_jax.train_ngram"
        )
    return [line]


def first_transcripts(source: Any) -> list[Any]:
    """Of the first examples that can be read, which are decoded for it. Raises UserError: none."""
    next(source.items())
    found = []
    for i in range(min(FIRST, len(source))):
        with contextlib.suppress(ExampleError):
            found.append(source[i].get("transcript"))
    return found


def targets(config: Mapping[str, Any], head: Ctc) -> finetune.Targets:
    """labels int [U] of the transcript, -1 for none; U is half of the frames, and one more.

    Longer transcripts, more than 25 characters a second, are `infeasible`: they cost nothing.
    """
    characters = characters_of(config)
    if head.vocab_size != len(characters):
        raise UserError(
            f"config.head.vocab_size: {head.vocab_size}, but with the {len(SPECIALS) + 1} special "
            f"ones there are {len(characters)} characters"
        )
    if head.blank != BLANK:
        raise UserError(f"config.head.blank: {head.blank}, but the first character is the blank")
    frontend, normaliser = frontend_of(config), normaliser_of(config)
    most = finetune.DataConfig(**config["data"]).max_outside_share
    surveys: dict[str, normalise.Survey] = {}  # by split, in the order in which they are checked

    def size(length):
        return (frontend.frames(length) + 1) // 2 + 1

    def shapes(length):
        return {"labels": jax.ShapeDtypeStruct((size(length),), np.int32)}

    def read(item, length):
        text = transcript_of(item.get("transcript"), normaliser, str(item.get("path", "example")))
        labels, found = characters.encode(text), np.full(size(length), -1, np.int32)
        if len(labels) > len(found):
            found[:] = characters.space  # equal ones need a blank between each two
        else:
            found[: len(labels)] = labels
        return {"labels": found}

    def check(source):
        texts, which = source.column("transcript"), ""
        if texts is None:
            texts = first_transcripts(source)
            which = f"the first {len(texts)} " if len(texts) < len(source) else ""
        known = [text for text in texts if isinstance(text, str)]
        if not known:
            transcript_of(None, normaliser, source.uri)
        scoring = ScoringConfig(**config.get("scoring", {}))
        lines = [] if surveys else check_language_model(scoring, normaliser, most)
        name = f"{which}transcripts of {source.uri} {source.split}"
        surveys[source.split] = normaliser.survey(known)
        surveys[source.split].check(name, most)
        return [surveys[source.split].line(name), *lines]

    def save(folder):
        characters.save(folder / "vocab.json")
        normalise.save(folder, normaliser, surveys)

    def outputs(stored):
        path = stored and Path(stored["folder"]) / "vocab.json"
        if path and not path.is_file():
            return ()
        return (Characters.load(path) if path else characters).names

    return finetune.Targets(shapes, read, check, save, outputs=outputs)


def frontend_of(config: Mapping[str, Any]) -> Any:
    """The front end of a config's model, which knows its frames."""
    model = config["model"]
    return make_frontend(model.get("frontend", {}), model["width"])


def make(config: Mapping[str, Any]) -> Task:
    """The task of a config; see `finetune.make`."""
    return finetune.make(config, job(config))


def abstract_task(config: Mapping[str, Any]) -> Task:
    """The same task without its data."""
    return finetune.abstract_task(config, job(config))


def job(config: Mapping[str, Any]) -> finetune.FinetuneSpec:
    """What CTC adds to fine-tuning."""
    step = frontend_of(config).hop
    given = {"characters": characters_of(config), "normaliser": normaliser_of(config)}
    most = config["data"].get("max_outside_share", normalise.MAX_OUTSIDE_SHARE)
    scored = functools.partial(score, step=step, max_outside_share=most, **given)
    return finetune.FinetuneSpec(
        make_loss,
        make_predict,
        scored,
        targets,
        loss_config=LossConfig,
        scoring_config=ScoringConfig,
    )
