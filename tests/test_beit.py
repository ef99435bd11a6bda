"""BEiT's .pth files, made at random here, against Hugging Face's class with the same weights.

D width, L layers, H heads, N patches.
"""

import argparse

import numpy as np
import pytest

from data2vec_jax.convert import export, loaded, ours, pickles
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.positions import relative_index

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

D, L, H, MLP, PATCH, C = 16, 2, 4, 24, 4, 5


def weights(
    shared=True,
    own=False,
    absolute=False,
    scale=True,
    bias=True,
    fine_tuned=None,
    grid=(3, 3),
    seed=0,
):
    """A state dict with the names of BEiT's code, of random tensors."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    shapes = {
        "cls_token": (1, 1, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (D,),
    }
    if absolute:
        shapes["pos_embed"] = (1, grid[0] * grid[1] + 1, D)
    if shared:
        shapes["rel_pos_bias.relative_position_bias_table"] = (rows, H)
    for l in range(L):
        block = {
            "norm1.weight": (D,),
            "norm1.bias": (D,),
            "attn.qkv.weight": (3 * D, D),
            "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,),
            "norm2.weight": (D,),
            "norm2.bias": (D,),
            "mlp.fc1.weight": (MLP, D),
            "mlp.fc1.bias": (MLP,),
            "mlp.fc2.weight": (D, MLP),
            "mlp.fc2.bias": (D,),
        }
        block |= {"gamma_1": (D,), "gamma_2": (D,)} if scale else {}
        block |= {"attn.q_bias": (D,), "attn.v_bias": (D,)} if bias else {}
        block |= {"attn.relative_position_bias_table": (rows, H)} if own else {}
        shapes |= {f"blocks.{l}.{name}": shape for name, shape in block.items()}
    if fine_tuned is None:
        shapes |= {"mask_token": (1, 1, D), "lm_head.weight": (D, D), "lm_head.bias": (D,)}
    else:
        shapes |= {"head.weight": (C, D), "head.bias": (C,)}
    final = "fc_norm" if fine_tuned == "mean" else "norm"
    shapes |= {f"{final}.weight": (D,), f"{final}.bias": (D,)}
    rng = np.random.default_rng(seed)
    state = {
        name: torch.tensor(rng.normal(size=shape) * 0.3, dtype=torch.float32)
        for name, shape in shapes.items()
    }
    index = torch.tensor(relative_index(grid), dtype=torch.int64)
    if shared:
        state["rel_pos_bias.relative_position_index"] = index
    if own:
        state |= {f"blocks.{l}.attn.relative_position_index": index for l in range(L)}
    return state


CASES = {
    "pretrained": {},
    "both biases and positions": dict(own=True, absolute=True),
    "positions only": dict(shared=False, absolute=True, scale=False),
    "no biases": dict(shared=False, own=True, bias=False),
    "fine-tuned": dict(shared=False, own=True, fine_tuned="mean"),
    "fine-tuned, class token": dict(fine_tuned="class"),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name, tmp_path):
    torch.save({"model": weights(**CASES[name]), "args": {"num_heads": H}}, tmp_path / "x.pth")
    checkpoint = ours.open_checkpoint(tmp_path / "x.pth")
    ours.demand_whole(checkpoint)
    written = export.export(checkpoint, tmp_path / "hf", "hf")
    assert all(path.startswith("head/") for path in written.dropped)
    fine_tuned = CASES[name].get("fine_tuned")
    kind = "ForImageClassification" if fine_tuned else "Model"
    theirs, report = getattr(transformers, f"Data2VecVision{kind}").from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 3, 12, 12)).astype(np.float32)
    given, more = {}, {}
    if not fine_tuned:
        mask = rng.random((2, 9)) < 0.5
        given, more = {"bool_masked_pos": torch.tensor(mask)}, {"mask": mask}
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(image), output_hidden_states=True, **given)
    out = loaded.load(tmp_path / "x.pth")(image.transpose(0, 2, 3, 1), **more)
    for a, b in zip(out.hidden_states, wanted.hidden_states, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    field = "logits" if fine_tuned else "last_hidden_state"
    np.testing.assert_allclose(getattr(out, field), wanted[field], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_there_and_back(name, wrapper, tmp_path):
    student, teacher = weights(**CASES[name]), weights(**CASES[name], seed=5)
    args = argparse.Namespace(num_heads=H, drop_path=0.1, nothing=None)
    torch.save({wrapper: student, "model_ema": teacher, "args": args}, tmp_path / "x.pth")
    export.export(ours.open_checkpoint(tmp_path / "x.pth"), tmp_path / "jax", "jax")
    again = ours.open_checkpoint(tmp_path / "jax")
    assert again.config["model"]["encoder"]["drop_path"] == 0.1
    export.export(again, tmp_path / "again.pth", "fairseq")
    found = torch.load(tmp_path / "again.pth", weights_only=True)
    assert {*found} == {wrapper, "model_ema", "args"}
    assert found["args"] == vars(args)
    for wanted, state in ((student, found[wrapper]), (teacher, found["model_ema"])):
        assert {*state} == {*wanted}
        for key, x in wanted.items():
            assert x.dtype == state[key].dtype and torch.equal(x, state[key]), key


def test_the_teacher_can_be_chosen(tmp_path):
    student, teacher = weights(), weights(seed=5)
    torch.save({"model": student, "model_ema": teacher}, tmp_path / "x.pth")
    checkpoint = ours.open_checkpoint(tmp_path / "x.pth")
    for chosen, state in ((checkpoint, student), (ours.of_teacher(checkpoint), teacher)):
        np.testing.assert_array_equal(chosen.tree()["class_token"], state["cls_token"][0, 0])


def test_a_model_of_ours_becomes_a_file(tmp_path):
    """Settings are made from our config where there are none to return."""
    torch.save({"model": weights(own=True)}, tmp_path / "x.pth")
    checkpoint = ours.open_checkpoint(tmp_path / "x.pth")
    config = {key: x for key, x in checkpoint.config.items() if key != "origin"}
    plain = ours.Checkpoint(checkpoint.path, config, checkpoint.entries)
    export.export(plain, tmp_path / "again.pth", "fairseq")
    again = ours.open_checkpoint(tmp_path / "again.pth")
    assert again.config["model"] == config["model"]
    args = pickles.read(tmp_path / "again.pth")["args"]
    assert args["num_heads"] == H and args["use_rel_pos_bias"] is True


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    def opened(args, **options):
        torch.save({"model": weights(**options), "args": args}, tmp_path / "x.pth")
        return ours.open_checkpoint(tmp_path / "x.pth").config["model"]

    assert opened({"img_size": [8, 16]}, grid=(2, 4))["image"] == [8, 16]
    with pytest.raises(UserError, match="size of images"):
        opened({}, grid=(2, 4))
    with pytest.raises(UserError, match="how many heads"):
        opened({}, shared=False, absolute=True)
    state = weights()
    state["blocks.0.attn.qkv.bias"] = torch.zeros(3 * D)
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.bias"):
        ours.open_checkpoint(tmp_path / "x.pth")
