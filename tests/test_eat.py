"""EAT's checkpoints, with random weights under its names (docs/spec/sound.md section 8)."""

import dataclasses
import json

import numpy as np
import pytest

import data2vec_jax
from data2vec_jax.convert import export, loaded, ours, pickles
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.models.positions import sincos

D, DEPTH, MLP, CLASSES = 32, 2, 64, 50
RNG = np.random.default_rng(0)
MODE = "modality_encoders.IMAGE"


def random(*shape):
    return (RNG.normal(size=shape) * 0.05).astype(np.float32)


def block(name):
    return {
        f"{name}.norm1.weight": 1 + random(D), f"{name}.norm1.bias": random(D),
        f"{name}.attn.qkv.weight": random(3 * D, D), f"{name}.attn.qkv.bias": random(3 * D),
        f"{name}.attn.proj.weight": random(D, D), f"{name}.attn.proj.bias": random(D),
        f"{name}.norm2.weight": 1 + random(D), f"{name}.norm2.bias": random(D),
        f"{name}.mlp.fc1.weight": random(MLP, D), f"{name}.mlp.fc1.bias": random(MLP),
        f"{name}.mlp.fc2.weight": random(D, MLP), f"{name}.mlp.fc2.bias": random(D),
    }  # fmt: skip


def encoder():
    """Names of the pretraining code's encoder."""
    state = {
        f"{MODE}.extra_tokens": random(1, 1, D),
        f"{MODE}.local_encoder.proj.weight": random(D, 1, 16, 16),
        f"{MODE}.local_encoder.proj.bias": random(D),
        f"{MODE}.fixed_positional_encoder.positions": sincos((768, 8), D)[None],
        f"{MODE}.context_encoder.norm.weight": 1 + random(D),
        f"{MODE}.context_encoder.norm.bias": random(D),
    }
    for i in range(DEPTH):
        state |= block(f"blocks.{i}")
    return state


def pretrained():
    """`model` of a pretraining file, with its teacher."""
    state = encoder()
    for i in range(2):
        state[f"{MODE}.decoder.blocks.{i}.0.weight"] = random(D, 2, 3, 3)
        state[f"{MODE}.decoder.blocks.{i}.0.bias"] = random(D)
    state |= {f"{MODE}.decoder.proj.weight": random(D, D), f"{MODE}.decoder.proj.bias": random(D)}
    return state | {"_ema": encoder()}


def settings():
    image = {
        "in_chans": 1, "input_size": 224, "patch_size": 16, "num_extra_tokens": 1,
        "fixed_positions": True, "target_length": 1024, "prenet_depth": 0,
        "use_alibi_encoder": False, "embed_dim": D,
        "decoder": {
            "decoder_layers": 2, "decoder_dim": D, "decoder_kernel": 3, "decoder_groups": 16,
            "decoder_residual": True, "input_dropout": 0.0, "projection_layers": 1,
        },
    }  # fmt: skip
    return {
        "_name": "data2vec_multi", "embed_dim": D, "num_heads": 4, "depth": DEPTH,
        "mlp_ratio": MLP / D, "norm_eps": 1e-6, "attention_dropout": 0.0,
        "activation_dropout": 0.0, "encoder_dropout": 0.0, "layerdrop": 0.0,
        "layer_norm_first": False, "supported_modality": "IMAGE", "modalities": {"image": image},
    }  # fmt: skip


def write_pickle(path, state, cfg):
    def nested(part):
        return {
            k: nested(v) if isinstance(v, dict) else entries_of({k: v})[0] for k, v in part.items()
        }

    pickles.write(path, {"cfg": cfg, "model": nested(state)})
    return path


def flat(state):
    teacher = {f"_ema.{k}": v for k, v in state.get("_ema", {}).items()}
    return {k: v for k, v in state.items() if k != "_ema"} | teacher


@pytest.fixture
def pretraining_file(tmp_path):
    state = pretrained()
    cfg = {"model": settings(), "task": {"audio_mae": True}}
    return write_pickle(tmp_path / "eat.pt", state, cfg), state


def test_a_pretraining_file_is_sound(pretraining_file, tmp_path):
    path, state = pretraining_file
    found = ours.open_checkpoint(path)
    assert found.config["modality"] == "sound" and found.config["teacher"] == "model"
    assert found.config["model"]["frames"] == 1024
    assert not ours.missing(found)
    params = loaded.load(path).params
    assert np.array_equal(
        params["patches"]["kernel"],
        state[f"{MODE}.local_encoder.proj.weight"].transpose(2, 3, 1, 0),
    )
    # There and back: the same names, shapes and bytes.
    export.export(found, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "again.pt", "fairseq")
    content = pickles.read(tmp_path / "again.pt")
    again, before = pickles.tensors(content["model"]), flat(state)
    assert {*again} == {*before}
    assert all(again[name].tobytes() == before[name].tobytes() for name in before)
    assert ours.open_checkpoint(tmp_path / "again.pt").config["modality"] == "sound"


def test_settings_made_anew_say_the_same(pretraining_file, tmp_path):
    """Without what the file came with, as of our own runs."""
    found = ours.open_checkpoint(pretraining_file[0])
    config = {k: v for k, v in found.config.items() if k != "origin"}
    export.export(dataclasses.replace(found, config=config), tmp_path / "new.pt", "fairseq")
    new = ours.open_checkpoint(tmp_path / "new.pt").config
    for key in ("modality", "model", "teacher", "prenet"):
        assert new[key] == config[key], key


def test_a_picture_stays_one(tmp_path):
    state, cfg = pretrained(), settings()
    for part in (state, state["_ema"]):
        part[f"{MODE}.local_encoder.proj.weight"] = random(D, 3, 16, 16)
        part[f"{MODE}.fixed_positional_encoder.positions"] = sincos((14, 14), D)[None]
    cfg["modalities"]["image"] |= {"in_chans": 3}
    del cfg["modalities"]["image"]["target_length"]
    path = write_pickle(tmp_path / "picture.pt", state, {"model": cfg})
    assert ours.open_checkpoint(path).config["modality"] == "vision"


def fine_tuned_state():
    state = {f"model.{k}": v for k, v in encoder().items()}
    return state | {
        "fc_norm.weight": 1 + random(D), "fc_norm.bias": random(D),
        "head.weight": random(CLASSES, D), "head.bias": random(CLASSES),
    }  # fmt: skip


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def test_a_fine_tuned_file(tmp_path):
    """ESC-50's classes tell its statistics; the head reads the normed class token."""
    state = fine_tuned_state()
    cfg = {
        "model": {
            "_name": "mae_image_classification",
            "audio_mae": True,
            "w2v_args": {"model": settings()},
        }
    }
    path = write_pickle(tmp_path / "esc.pt", state, {k: v for k, v in cfg.items()})
    model = data2vec_jax.load(path)
    assert model.config["modality"] == "sound" and model.config["head"]["classes"] == CLASSES
    assert (model.config["model"]["mean"], model.config["model"]["std"]) == (-6.627, 5.359)
    audio = RNG.normal(size=(2, 40_000)).astype(np.float32) * 0.1
    out = model(audio)
    token = np.asarray(out.last_hidden_state[:, 0], np.float64)
    normed = layer_norm(token, state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    wanted = normed @ state["head.weight"].T + state["head.bias"]
    assert np.allclose(out.logits, wanted, atol=1e-4)
    # Padding: as the sound alone.
    padded = np.pad(audio, ((0, 0), (0, 3_000)))
    mask = np.arange(43_000) >= 40_000
    again = model(padded, np.stack([mask] * 2))
    assert np.allclose(again.logits, out.logits, atol=1e-3)

    export.export(ours.open_checkpoint(path), tmp_path / "again.pt", "fairseq")
    again = pickles.tensors(pickles.read(tmp_path / "again.pt")["model"])
    assert {*again} == {*state}
    assert all(again[name].tobytes() == state[name].tobytes() for name in state)


def folder_state(head):
    names = {
        f"{MODE}.extra_tokens": "model.extra_tokens",
        f"{MODE}.local_encoder.proj.weight": "model.local_encoder.proj.weight",
        f"{MODE}.local_encoder.proj.bias": "model.local_encoder.proj.bias",
        f"{MODE}.fixed_positional_encoder.positions": "model.fixed_positional_encoder.positions",
        f"{MODE}.context_encoder.norm.weight": "model.pre_norm.weight",
        f"{MODE}.context_encoder.norm.bias": "model.pre_norm.bias",
    }
    state = {names.get(k, f"model.{k}"): v for k, v in encoder().items()}
    if head:
        state |= {
            "model.fc_norm.weight": 1 + random(D), "model.fc_norm.bias": random(D),
            "model.head.weight": random(527, D), "model.head.bias": random(527),
        }  # fmt: skip
    return state


@pytest.mark.parametrize("head", [False, True], ids=["pretrained", "fine-tuned"])
def test_a_hugging_face_folder(head, tmp_path):
    state = folder_state(head)
    place = tmp_path / "eat"
    place.mkdir()
    config = {
        "architectures": ["EATModel"],
        "model_type": "eat", "embed_dim": D, "depth": DEPTH, "num_heads": 4, "mel_bins": 128,
        "img_size": [1024, 128], "model_variant": "finetune" if head else "pretrain",
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    safetensors.write_safetensors(place / "model.safetensors", entries_of(state), {"format": "pt"})
    found = ours.open_checkpoint(place)
    assert found.config["modality"] == "sound" and not ours.missing(found)
    assert bool(found.config.get("head")) == head
    if head:  # sound trap (h)
        assert found.config["head"]["eps"] == 1e-5
    out = data2vec_jax.load(place)(RNG.normal(size=(1, 160_000)).astype(np.float32) * 0.1)
    assert out.last_hidden_state.shape == (1, 1 + 512, D)
    assert (out.logits is not None) == head
    export.export(found, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "again", "hf")
    again = dict(safetensors.SafeTensors(tmp_path / "again/model.safetensors"))
    assert {*again} == {*state}
    assert all(np.array_equal(again[name], state[name]) for name in state)
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    told = (tmp_path / "again/README.md").read_text()  # transformers cannot open it as it is
    assert "A [data2vec 2.0]" in told and "trust_remote_code=True" in told
    assert "Neither transformers nor this folder has EAT's class" in told


def test_a_pretraining_file_as_a_folder(pretraining_file, tmp_path):
    """What the folder has no place for is named; the encoder is the same."""
    path, _ = pretraining_file
    written = export.export(ours.open_checkpoint(path), tmp_path / "folder", "hf")
    assert {name.split("/")[0] for name in written.dropped} >= {"decoder", "head"}
    audio = RNG.normal(size=(1, 50_000)).astype(np.float32) * 0.1
    one = data2vec_jax.load(path)(audio).last_hidden_state
    other = data2vec_jax.load(tmp_path / "folder")(audio).last_hidden_state
    assert np.allclose(one, other, atol=1e-5)


def test_what_eat_has_no_place_for(pretraining_file, tmp_path):
    found = ours.open_checkpoint(pretraining_file[0])
    found.config.pop("origin")
    found.config["head"] = {"name": "image", "classes": 3, "pooling": "mean"}
    for to in ("hf", "fairseq"):
        with pytest.raises(UserError, match="EAT has a norm of the class token"):
            export.export(found, tmp_path / to, to)
