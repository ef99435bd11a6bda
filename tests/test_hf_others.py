"""Hugging Face's BERT, RoBERTa, ViT, wav2vec 2.0 and HuBERT, against transformers.

Each case is one of their classes with fields of its config away from their defaults: random
weights, saved by them, must give the same outputs here, and come back to them unchanged.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import quick_jit

from data2vec_jax.convert import export, loaded, ours
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import nest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ENCODER = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3
)
TEXT = ENCODER | dict(vocab_size=31, max_position_embeddings=30)
IMAGE = ENCODER | dict(image_size=12, patch_size=4)
SPEECH = ENCODER | dict(
    conv_dim=[6, 8],
    conv_kernel=[10, 3],
    conv_stride=[5, 2],
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    vocab_size=9,
    pad_token_id=0,
)
FAMILIES = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "ViT": IMAGE,
    "Wav2Vec2": SPEECH,
    "Hubert": SPEECH,
}
LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
CASES = {  # name -> (class, its config)
    "bert": ("BertModel", dict(layer_norm_eps=1e-2)),
    "bert, pad 5": ("BertModel", dict(pad_token_id=5, type_vocab_size=3, hidden_act="relu")),
    "bert, words": ("BertForMaskedLM", dict(layer_norm_eps=1e-3)),
    "bert, own output": ("BertForMaskedLM", dict(tie_word_embeddings=False)),
    "bert, both tasks": ("BertForPreTraining", {}),
    "bert, sentences": ("BertForSequenceClassification", {}),
    "bert, tokens": ("BertForTokenClassification", {}),
    "bert, answers": ("BertForQuestionAnswering", dict(num_labels=2)),
    "bert, choices": ("BertForMultipleChoice", {}),
    "roberta": ("RobertaModel", dict(pad_token_id=2, type_vocab_size=1, hidden_act="gelu_new")),
    "roberta, words": ("RobertaForMaskedLM", dict(layer_norm_eps=1e-5)),
    "roberta, sentences": ("RobertaForSequenceClassification", {}),
    "vit": ("ViTModel", dict(layer_norm_eps=1e-2)),
    "vit, no bias": ("ViTModel", dict(qkv_bias=False, hidden_act="relu", num_channels=1)),
    "vit, another shape": ("ViTModel", dict(image_size=[8, 12], patch_size=[4, 2])),
    "vit, classes": ("ViTForImageClassification", {}),
    "wav2vec2": ("Wav2Vec2Model", dict(layer_norm_eps=1e-3)),
    "wav2vec2, large": ("Wav2Vec2Model", LARGE | dict(num_conv_pos_embeddings=5)),
    "wav2vec2, large, group norm": (
        "Wav2Vec2Model",
        dict(do_stable_layer_norm=True, conv_bias=True, feat_extract_activation="relu"),
    ),
    "wav2vec2, adapter": ("Wav2Vec2Model", dict(add_adapter=True, mask_time_prob=0.0)),
    "wav2vec2, pretraining": ("Wav2Vec2ForPreTraining", dict(num_codevectors_per_group=4)),
    "wav2vec2, letters": ("Wav2Vec2ForCTC", LARGE),
    "wav2vec2, classes": ("Wav2Vec2ForSequenceClassification", dict(use_weighted_layer_sum=True)),
    "hubert": ("HubertModel", dict(feat_extract_norm="layer", hidden_act="relu")),
    "hubert, large": ("HubertModel", LARGE),
    "hubert, letters": ("HubertForCTC", {}),
}


def make(name):
    """Their model with random weights, norms and biases included."""
    kind, options = CASES[name]
    family = next(x for x in FAMILIES if kind.startswith(x))
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES[family] | options, attn_implementation="eager"
    )
    torch.manual_seed(len(name))
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn_like(parameter))
        for head in ("cls", "lm_head"):  # two names of one bias, of which one is never used
            if hasattr(model, head) and hasattr(part := getattr(model, head), "predictions"):
                part.predictions.bias.copy_(part.predictions.decoder.bias)
            elif hasattr(model, head) and hasattr(part, "decoder"):
                part.bias.copy_(part.decoder.bias)
    return model


def inputs_of(model):
    """[(their arguments, ours)]: with padding where there can be some; images of two sizes."""
    c, random = model.config, np.random.default_rng(0)
    if "conv_dim" in c.to_dict():
        audio = random.normal(size=(2, 700)).astype(np.float32)
        padding = np.zeros(audio.shape, bool)
        padding[1, 431:] = True
        return [with_padding({"input_values": audio}, {"audio": audio}, padding)]
    if "image_size" in c.to_dict():
        height, width = np.broadcast_to(c.image_size, 2)
        image = random.normal(size=(2, height, width, c.num_channels)).astype(np.float32)
        larger = random.normal(size=(2, 16, 16, c.num_channels)).astype(np.float32)
        runs = [({"pixel_values": image.transpose(0, 3, 1, 2)}, {"image": image})]
        if type(model).__name__.endswith("Model") and height == width:  # positions of another grid
            resized = {"interpolate_pos_encoding": True} if c.model_type == "vit" else {}
            theirs = {"pixel_values": larger.transpose(0, 3, 1, 2)} | resized
            runs.append((theirs, {"image": larger}))
        return runs
    shape = (2, 3, 11) if "Choice" in type(model).__name__ else (3, 11)
    tokens = random.integers(6, c.vocab_size, shape).astype(np.int32)
    padding = np.zeros(shape, bool)
    padding[..., 1, 7:] = True
    padding[..., 2, :3] = True  # at the left: places count pads in BERT, and not in RoBERTa
    tokens = np.where(padding, c.pad_token_id, tokens).astype(np.int32)
    types = random.integers(0, c.type_vocab_size, shape).astype(np.int32)
    own = {"tokens": tokens, "types": types}
    theirs = {"input_ids": tokens.astype(np.int64), "token_type_ids": types.astype(np.int64)}
    return [with_padding(theirs, own, padding)]


def with_padding(theirs, own, padding):
    return theirs | {"attention_mask": 1 - padding.astype(np.int64)}, own | {"padding": padding}


NAMES = {"prediction_logits": "logits", "projected_states": None}  # of classes for pretraining
NAMES |= {"projected_quantized_states": None, "codevector_perplexity": None}
NAMES |= {"seq_relationship_logits": None}


def compare(out, theirs, model):
    """Every output that is one of ours; returns how many."""
    count = 0
    if transformers.__version__ < "5" and getattr(model.config, "do_stable_layer_norm", False):
        # There the last of the states is after the norm that follows the blocks.
        out = out._replace(hidden_states=(*out.hidden_states[:-1], out.last_hidden_state))
    for key, value in theirs.items():
        name = NAMES.get(key, key)
        if name is None:
            continue
        own = getattr(out, name)
        pairs = zip(own, value, strict=True) if key == "hidden_states" else ((own, value),)
        for a, b in pairs:
            np.testing.assert_allclose(a, b.numpy(), atol=1e-4, err_msg=key)
        count += 1
    return count


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_back(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = ours.open_checkpoint(tmp_path / "theirs")
    ours.demand_whole(checkpoint)
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, nest(checkpoint.tree()))
    forward = quick_jit(lambda params, inputs: loaded.forward(config, params, inputs))
    for theirs, own in inputs_of(model):
        with torch.no_grad():
            wanted = model(
                **{
                    k: torch.tensor(v) if k != "interpolate_pos_encoding" else v
                    for k, v in theirs.items()
                },
                output_hidden_states=True,
            )
        assert compare(forward(params, own), wanted, model) >= (1 if "pretraining" in name else 2)
    export.export(checkpoint, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    kind = getattr(transformers, written["architectures"][0])
    again, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    wrong = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert [report[key] for key in wrong if report[key]] == []
    state = model.state_dict()
    if kind is not type(model):  # its part without the tasks of pretraining
        state = {k.removeprefix("wav2vec2."): v for k, v in state.items()}
    assert [k for k, x in again.state_dict().items() if not torch.equal(x, state[k])] == []


def old_weight_norm(name):
    """As files of transformers 4 spell a convolution with normalised weights."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.replace(f"parametrizations.weight.{new}", old)
    return name


def old_norms(name):
    """As BERT's first files spell layer norms."""
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        name = name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}")
    return name


SPELLINGS = {
    "gamma and beta": ("bert", old_norms),
    "with a prefix": ("bert", lambda name: f"bert.{name}"),
    "without its prefix": ("vit, classes", lambda name: name.removeprefix("vit.")),
    "weight_g": ("wav2vec2", old_weight_norm),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_other_spellings_are_the_same_model(kind, tmp_path):
    name, change = SPELLINGS[kind]
    make(name).save_pretrained(tmp_path)
    usual = ours.open_checkpoint(tmp_path).tree()
    weights = tmp_path / "model.safetensors"
    state = {change(n): torch.tensor(x) for n, x in safetensors.SafeTensors(weights).items()}
    assert {*state} != {*safetensors.SafeTensors(weights)}
    weights.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = ours.open_checkpoint(tmp_path).tree()
    assert {*found} == {*usual}
    assert all(np.array_equal(found[path], array) for path, array in usual.items())


REFUSED = [  # (case, change of its config.json, message)
    ("bert", dict(position_embedding_type="relative_key"), "'position_embedding_type' = 'rel"),
    ("bert", dict(is_decoder=True), "'is_decoder' = True is not supported"),
    ("bert", dict(architectures=["BertLMHeadModel"]), "architecture 'BertLMHeadModel' is not"),
    ("bert", dict(architectures=["BertForMaskedLM"]), "it lacks 'task/"),
    ("bert", dict(hidden_act="gelu_neu"), "activation: no 'gelu_neu'; did you mean"),
    ("bert", dict(hidden_size=20), "does not fit the config"),
    ("bert", dict(model_type="roberta"), "architecture 'BertModel' is not supported"),
    ("bert", dict(model_type="electra"), "of another model than those that open here (electra:"),
    ("bert, words", dict(hidden_act="relu"), "'hidden_act' = 'relu' is not supported with BertFor"),
    ("vit", dict(pooler_act="relu"), "'pooler_act' = 'relu' is not supported"),
    (
        "vit",
        dict(qkv_bias=False),
        "the weights have 'encoder.layer.0.attention.attention.key.bias'",
    ),
    ("vit", dict(image_size=16), "does not fit the config"),
    ("vit", dict(model_type="dinov2"), "of another model than those that open here (dinov2:"),
    ("wav2vec2", dict(adapter_attn_dim=16), "'adapter_attn_dim' = 16 is not supported"),
    ("wav2vec2", dict(feat_extract_norm="layer"), "it lacks 'frontend/norm1/bias'"),
    ("wav2vec2", dict(num_conv_pos_embeddings=9), "does not fit the config"),
    ("hubert", dict(feat_proj_layer_norm=False), "'feat_proj_layer_norm' = False is not"),
    ("hubert", dict(conv_pos_batch_norm=True), "'conv_pos_batch_norm' = True is not supported"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> a folder with its model."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("saved")
            make(name).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_what_cannot_be_represented_is_named(name, change, message, saved, tmp_path):
    shutil.copytree(saved(name), tmp_path / "x")
    config = json.loads((tmp_path / "x/config.json").read_text())
    files.write_json(tmp_path / "x/config.json", config | change)
    with pytest.raises(UserError) as error:
        ours.demand_whole(ours.open_checkpoint(tmp_path / "x"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("normalised", [True, False])
def test_statistics_of_pixels_are_the_processors(normalised, saved, tmp_path):
    shutil.copytree(saved("vit"), tmp_path / "x")
    processor = transformers.ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        do_normalize=normalised,
        do_resize=False,
    )
    processor.save_pretrained(tmp_path / "x")
    model = ours.model_of(ours.open_checkpoint(tmp_path / "x").config)
    image = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), np.uint8)
    theirs = processor(images=list(image), return_tensors="np", input_data_format="channels_last")
    wanted = theirs["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.normalised({"image": image}), wanted, atol=1e-5)
