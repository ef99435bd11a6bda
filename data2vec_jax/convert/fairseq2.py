"""Weights in fairseq's layout: data2vec 2.0 (finetuning_and_conversion 5.4).

All modalities share one class of model. Its modality encoder stands below
`modality_encoders.{AUDIO,IMAGE,TEXT}`, with the lowest ("prenet") blocks if there are any; the
others stand at the top, numbered from 0 again. Ours are one stack: `joined` and `parted` renumber.

The teacher has the same names, unless it is just the list of blocks (text).
"""

import re
from collections.abc import Mapping

import numpy as np

from data2vec_jax.convert.tables import (
    CONV1D,
    CONV2D,
    Change,
    Row,
    State,
    Table,
    conv1d,
    head,
    inside,
    linear,
    norm,
)  # fmt: skip

MANY = 32  # more convolutions than any stack has
BUFFERS = ["^_ema$", r"\.alibi_bias$", r"\.encoder_mask$"]  # the last two in older files

# [1 or L, 1, 1 or H, 1, 1] (in older files without the first axis) -> [1 or L, 1 or H]
SCALES = Change(
    lambda x: x[0].reshape(-1, *x[0].shape[-4:])[:, 0, :, 0, 0],
    lambda x: [x[:, None, :, None, None]],
)
# [1, E, D] -> [E, D], or [D] if there is one
EXTRA = Change(
    lambda x: x[0][0, 0] if x[0].shape[1] == 1 else x[0][0],
    lambda x: [x.reshape(1, -1, x.shape[-1])],
)

BLOCKS = [
    *linear("blocks.{l}.attn.qkv", "encoder/blocks/qkv"),
    *linear("blocks.{l}.attn.proj", "encoder/blocks/out"),
    *norm("blocks.{l}.norm1", "encoder/blocks/norm1"),
    *linear("blocks.{l}.mlp.fc1", "encoder/blocks/up"),
    *linear("blocks.{l}.mlp.fc2", "encoder/blocks/down"),
    *norm("blocks.{l}.norm2", "encoder/blocks/norm2"),
]


def _context(mode: str) -> list[Row]:
    """Rows of what is between the front end and the blocks."""
    return [
        Row(f"{mode}.alibi_scale", "alibi/scale", SCALES),
        Row(f"{mode}.extra_tokens", "class_token", EXTRA),
        *norm(f"{mode}.context_encoder.norm", "norm"),
    ]


def _decoder(mode: str, change: Change, deep: bool) -> list[Row]:
    """Rows of decoder and head. deep: the head has several layers."""
    conv = f"{mode}.decoder.blocks.{{i}}.0"
    return [
        Row(f"{conv}.weight", "decoder/conv{i}/kernel", change),
        Row(f"{conv}.bias", "decoder/conv{i}/bias"),
        *(
            head(f"{mode}.decoder.proj", "head")
            if deep
            else linear(f"{mode}.decoder.proj", "head/linear0")
        ),
    ]


def speech(deep: bool = False, input_norm: bool = False) -> Table:
    """data2vec 2.0 for speech. deep: of the decoder's head, as in the other two. input_norm: of the
    positional convolutions."""
    mode = "modality_encoders.AUDIO"
    local, positions = f"{mode}.local_encoder.conv_layers", f"{mode}.relative_positional_encoder"
    rows = [
        *conv1d(f"{local}.{{i}}.0", "frontend/conv{i}"),
        *norm(f"{local}.{{i}}.2.1", "frontend/norm{i}"),
        *norm(f"{local}.0.2", "frontend/time_norm"),
        *norm(f"{mode}.project_features.1", "frontend/norm"),
        *linear(f"{mode}.project_features.2", "frontend/projection"),
    ]
    # Theirs count from 1, after a transposition, and are one level below if there is a norm first.
    inner = f"{positions}.1" if input_norm else positions
    rows += norm(f"{positions}.0", "positions/norm")
    for i in range(MANY):
        rows += conv1d(f"{inner}.{i + 1}.0", f"positions/conv{i}")
    return Table([*rows, *_context(mode), *BLOCKS, *_decoder(mode, CONV1D, deep)], BUFFERS)


def vision(deep: bool = False) -> Table:
    """data2vec 2.0 for vision."""
    mode = "modality_encoders.IMAGE"
    return Table(
        [
            Row(f"{mode}.local_encoder.proj.weight", "patches/kernel", CONV2D),
            Row(f"{mode}.local_encoder.proj.bias", "patches/bias"),
            *_context(mode),
            *BLOCKS,
            *_decoder(mode, CONV2D, deep),
        ],
        [*BUFFERS, r"fixed_positional_encoder\.positions$"],  # sines, computed from the grid
    )


def text(deep: bool = True) -> Table:
    """data2vec 2.0 for text."""
    mode = "modality_encoders.TEXT"
    local = f"{mode}.local_encoder"
    return Table(
        [
            Row(f"{local}.embed_tokens.weight", "embeddings/tokens"),
            Row(f"{local}.embed_positions.weight", "embeddings/positions"),
            *norm(f"{local}.layernorm_embedding", "embeddings/norm"),
            *_context(mode),
            *BLOCKS,
            *_decoder(mode, CONV1D, deep),
        ],
        BUFFERS,
    )


# A teacher that averages blocks only is saved as the list of them.
TEACHER_BLOCKS = inside(Table(BLOCKS), "blocks.")

_PRENET = re.compile(r"(modality_encoders\.\w+\.context_encoder\.)blocks\.(\d+)\.(.*)")
_MAIN = re.compile(r"blocks\.(\d+)\.(.*)")


def joined(state: Mapping[str, np.ndarray]) -> tuple[State, int]:
    """`state` with all blocks numbered through, and the number of prenet blocks."""
    prenet = [m for m in map(_PRENET.fullmatch, state) if m]
    count = len({m[2] for m in prenet})
    names = {m[0]: f"blocks.{m[2]}.{m[3]}" for m in prenet}
    names |= {m[0]: f"blocks.{int(m[1]) + count}.{m[2]}" for m in map(_MAIN.fullmatch, state) if m}
    return {names.get(name, name): array for name, array in state.items()}, count


def parted(state: Mapping[str, np.ndarray], prenet: int, mode: str) -> State:
    """The inverse of `joined`. mode: 'AUDIO', 'IMAGE' or 'TEXT'."""

    def theirs(name):
        found = _MAIN.fullmatch(name)
        if not found:
            return name
        number, rest = int(found[1]), found[2]
        if number >= prenet:
            return f"blocks.{number - prenet}.{rest}"
        return f"modality_encoders.{mode}.context_encoder.blocks.{number}.{rest}"

    return {theirs(name): array for name, array in state.items()}
