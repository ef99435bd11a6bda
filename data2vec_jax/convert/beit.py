"""Weights in BEiT's layout: data2vec 1.0 for vision (finetuning_and_conversion 5.3).

The student stands under `model`, the teacher under `model_ema`, both with all names.
"""

from data2vec_jax.convert.tables import CONV2D, LEAD1, LEAD2, LINEAR, Row, Table, linear, norm

BLOCK, OURS = "blocks.{l}", "encoder/blocks"

VISION = Table(
    rows=[
        Row("cls_token", "class_token", LEAD2),
        Row("mask_token", "mask_embedding", LEAD2),
        Row("pos_embed", "positions", LEAD1),
        Row("patch_embed.proj.weight", "patches/kernel", CONV2D),
        Row("patch_embed.proj.bias", "patches/bias"),
        Row("rel_pos_bias.relative_position_bias_table", "relative_bias"),
        *norm(f"{BLOCK}.norm1", f"{OURS}/norm1"),
        Row(f"{BLOCK}.attn.qkv.weight", f"{OURS}/qkv/kernel", LINEAR),
        Row(f"{BLOCK}.attn.q_bias", f"{OURS}/q_bias"),
        Row(f"{BLOCK}.attn.v_bias", f"{OURS}/v_bias"),
        Row(f"{BLOCK}.attn.relative_position_bias_table", f"{OURS}/relative_bias"),
        *linear(f"{BLOCK}.attn.proj", f"{OURS}/out"),
        Row(f"{BLOCK}.gamma_1", f"{OURS}/layer_scale1"),
        *norm(f"{BLOCK}.norm2", f"{OURS}/norm2"),
        *linear(f"{BLOCK}.mlp.fc1", f"{OURS}/up"),
        *linear(f"{BLOCK}.mlp.fc2", f"{OURS}/down"),
        Row(f"{BLOCK}.gamma_2", f"{OURS}/layer_scale2"),
        *norm("norm", "norm"),
        *linear("lm_head", "head/linear0"),
    ],
    ignored=[r"relative_position_index$"],  # computed from the grid
)
