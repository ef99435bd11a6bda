"""Weights in fairseq's layout: data2vec 1.0 for speech and text (finetuning_and_conversion 5.1-2).

fairseq keeps the teacher in a dict of its own (`_ema`, for text `encoder._ema`) whose names start
inside the averaged module; of the whole model if the teacher averages all of it.
"""

from data2vec_jax.convert.tables import (
    CONV1D,
    FUSED_BIAS,
    FUSED_LINEAR,
    Row,
    Table,
    conv1d,
    head,
    inside,
    linear,
    norm,
)  # fmt: skip


def _layers(theirs: str) -> list[Row]:
    """Rows of the Transformer layers below `theirs`."""
    layer, block = f"{theirs}.{{l}}", "encoder/blocks"
    qkv = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    return [
        Row(tuple(f"{name}.weight" for name in qkv), f"{block}/qkv/kernel", FUSED_LINEAR),
        Row(tuple(f"{name}.bias" for name in qkv), f"{block}/qkv/bias", FUSED_BIAS),
        *linear(f"{layer}.self_attn.out_proj", f"{block}/out"),
        *norm(f"{layer}.self_attn_layer_norm", f"{block}/norm1"),
        *linear(f"{layer}.fc1", f"{block}/up"),
        *linear(f"{layer}.fc2", f"{block}/down"),
        *norm(f"{layer}.final_layer_norm", f"{block}/norm2"),
    ]


SPEECH = Table(
    rows=[
        Row("mask_emb", "mask_embedding"),
        *conv1d("feature_extractor.conv_layers.{i}.0", "frontend/conv{i}"),
        *norm("feature_extractor.conv_layers.{i}.2.1", "frontend/norm{i}"),
        # The extractor with one norm over time, after its first convolution.
        *norm("feature_extractor.conv_layers.0.2", "frontend/time_norm"),
        *norm("layer_norm", "frontend/norm"),
        *linear("post_extract_proj", "frontend/projection"),
        *conv1d("encoder.pos_conv.{i}.0", "positions/conv{i}"),
        # A single positional convolution has normalised weights.
        Row("encoder.pos_conv.0.weight_g", "positions/conv/gain", CONV1D),
        Row("encoder.pos_conv.0.weight_v", "positions/conv/kernel", CONV1D),
        Row("encoder.pos_conv.0.bias", "positions/conv/bias"),
        *norm("encoder.layer_norm", "norm"),
        *_layers("encoder.layers"),
        *linear("final_proj", "head/linear0"),
    ],
    aliases=[(r"^final_proj\.0\.", "final_proj.")],
)
SPEECH_TEACHER = inside(SPEECH, "encoder.")

TEXT = Table(
    rows=[
        Row("encoder.sentence_encoder.embed_tokens.weight", "embeddings/tokens"),
        Row("encoder.sentence_encoder.embed_positions.weight", "embeddings/positions"),
        *norm("encoder.sentence_encoder.layernorm_embedding", "embeddings/norm"),
        *_layers("encoder.sentence_encoder.layers"),
        *norm("encoder.sentence_encoder.layer_norm", "norm"),
        *head("encoder.regression_head", "head"),
    ],
    ignored=[r"(^|\.)version$"],
    aliases=[(r"^decoder\.", "encoder."), (r"\.emb_layer_norm\.", ".layernorm_embedding.")],
)
TEXT_TEACHER = inside(TEXT, "encoder.sentence_encoder.")
