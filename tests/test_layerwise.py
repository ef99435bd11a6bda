"""Layer-wise rates of ViT-B and ViT-L against BEiT's rules, applied to the authors' own names."""

import jax
import jax.numpy as jnp
import pytest
from configs_for_tests import config_of

from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.tasks import layerwise
from data2vec_jax.tasks.pretrain import make_model

# Ours -> the authors' name and the dimensions of their tensor.
OUTSIDE = {
    "class_token": ("cls_token", 3),
    "mask_embedding": ("mask_token", 3),
    "patches/kernel": ("patch_embed.proj.weight", 4),
    "patches/bias": ("patch_embed.proj.bias", 1),
    "positions": ("pos_embed", 3),
    "relative_bias": ("rel_pos_bias.relative_position_bias_table", 2),
    "task/norm/scale": ("fc_norm.weight", 1),
    "task/norm/bias": ("fc_norm.bias", 1),
    "task/output/kernel": ("head.weight", 2),
    "task/output/bias": ("head.bias", 1),
}
INSIDE = {
    "norm1/scale": ("norm1.weight", 1),
    "norm1/bias": ("norm1.bias", 1),
    "norm2/scale": ("norm2.weight", 1),
    "norm2/bias": ("norm2.bias", 1),
    "qkv/kernel": ("attn.qkv.weight", 2),
    "q_bias": ("attn.q_bias", 1),
    "v_bias": ("attn.v_bias", 1),
    "out/kernel": ("attn.proj.weight", 2),
    "out/bias": ("attn.proj.bias", 1),
    "up/kernel": ("mlp.fc1.weight", 2),
    "up/bias": ("mlp.fc1.bias", 1),
    "down/kernel": ("mlp.fc2.weight", 2),
    "down/bias": ("mlp.fc2.bias", 1),
    "layer_scale1": ("gamma_1", 1),
    "layer_scale2": ("gamma_2", 1),
    "relative_bias": ("attn.relative_position_bias_table", 2),
}


def by_the_rules(name, dimensions, blocks, decay):
    """(layer id, factor, decays?) as BEiT's fine-tuning code has them, of its own names."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("blocks"):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = blocks + 1
    skipped = dimensions == 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
    return layer, decay ** (blocks + 1 - layer), not skipped


def shapes_of(variant, per_layer):
    """Shapes of a vision model of a config, without its pretraining head, with a classifier."""
    config = config_of("vision_v1", variant)
    config.model.absolute = True
    if per_layer:
        config.model.shared_relative = False
        config.model.encoder.relative = (14, 14)
    _, model = make_model(config)
    image = jnp.zeros((1, 224, 224, 3))
    key = jax.random.key(0)
    shapes = dict(jax.eval_shape(lambda: model.init(key, {"image": image})["params"]))
    width = config.model.width
    linear = {"kernel": jnp.zeros((width, 10)), "bias": jnp.zeros(10)}
    shapes["task"] = {"norm": shapes.pop("norm"), "output": linear}
    shapes.pop("head")
    return shapes, config.model.encoder.depth


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("variant", ["base", "large"])
def test_rates_of_vit_equal_beit(variant, per_layer):
    shapes, depth = shapes_of(variant, per_layer)
    rows = layerwise.table(shapes, depth, 0.65)
    assert len({(row.path, row.block) for row in rows}) == len(rows)
    names = set()
    for row in rows:
        if row.block is None:
            name, dimensions = OUTSIDE[row.path]
        else:
            name, dimensions = INSIDE[row.path.removeprefix("encoder/blocks/")]
            name = f"blocks.{row.block}.{name}"
        names.add(name)
        layer, factor, decays = by_the_rules(name, dimensions, depth, 0.65)
        assert (row.layer, row.decays) == (layer, decays), row
        assert row.factor == pytest.approx(factor, rel=1e-12), row
    tables = depth if per_layer else 1
    assert len(names) == len(OUTSIDE) - 1 + depth * (len(INSIDE) - 1) + tables  # none is missing
    factors = {row.layer: row.factor for row in rows}
    assert sorted(factors) == list(range(depth + 2)) and factors[depth + 1] == 1.0
    if variant == "base":  # the numbers of the paper's code
        assert [factors[0], factors[1], factors[12]] == pytest.approx(
            [3.697e-3, 5.688e-3, 0.65], 1e-3
        )


def test_rates_of_2_0_leave_embeddings_alone():
    shapes, depth = shapes_of("base", False)
    rows = layerwise.table(shapes, depth, 0.75, slow_embeddings=False)
    for row in rows:
        wanted = 1.0 if row.block is None else 0.75 ** (depth - row.block)
        assert row.factor == pytest.approx(wanted)


def test_the_table_as_text():
    shapes, depth = shapes_of("base", False)
    lines = layerwise.notes(layerwise.table(shapes, depth, 0.65))
    assert len(lines) == 1 + len(jax.tree.leaves(shapes))
    (kernel,) = [line.split() for line in lines if "qkv/kernel" in line]
    assert kernel == ["encoder/blocks/qkv/kernel", "1-12", "0.005688", "...", "0.65", "yes"]
    (token,) = [line.split() for line in lines if "class_token" in line]
    assert token == ["class_token", "0", "0.003697", "no"]


def test_mistakes():
    shapes, _ = shapes_of("base", False)
    with pytest.raises(UserError, match="12 blocks, not 24"):
        layerwise.table(shapes, 24, 0.65)
    with pytest.raises(UserError, match=r"layerwise_lr\.decay"):
        check_section("layerwise_lr", {"decay": 0.0}, layerwise.layer_rates, given=("depth",))
