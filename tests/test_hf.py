"""Hugging Face's data2vec for speech and text, against the installed transformers.

Each case is one of their classes with fields of its config away from their defaults: random
weights, saved by them, must give the same outputs and losses here, and come back byte for byte.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import quick_jit

from data2vec_jax.convert import export, loaded, ours
from data2vec_jax.core import files
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import nest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SPEECH = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=20,
    conv_dim=[6, 8],
    conv_kernel=[10, 3],
    conv_stride=[5, 2],
    num_conv_pos_embeddings=2,
    num_conv_pos_embedding_groups=4,
    conv_pos_kernel_size=3,
    vocab_size=9,
)
TEXT = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=30,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
)
XVECTOR = dict(
    tdnn_dim=[6, 7, 8],
    tdnn_kernel=[3, 2, 1],
    tdnn_dilation=[1, 2, 3],
    xvector_output_dim=5,
    num_labels=4,
)

CASES = {
    "convolutions": (
        "AudioModel",
        dict(
            conv_dim=[5, 6, 7, 4],
            conv_kernel=[7, 4, 1, 3],
            conv_stride=[3, 1, 2, 2],
            conv_bias=True,
            feat_extract_activation="relu",
            hidden_act="silu",
            layer_norm_eps=1e-3,
        ),
    ),
    "no position convolution": ("AudioModel", dict(num_conv_pos_embeddings=0)),
    "positions, even kernel": (
        "AudioModel",
        dict(
            num_conv_pos_embeddings=4,
            conv_pos_kernel_size=8,
            num_conv_pos_embedding_groups=1,
            feat_extract_activation="gelu_new",
        ),
    ),
    "positions, tiny kernels": (
        "AudioModel",
        dict(num_conv_pos_embeddings=3, conv_pos_kernel_size=2, num_conv_pos_embedding_groups=24),
    ),
    "positions, kernel 1": ("AudioModel", dict(conv_pos_kernel_size=1, hidden_act="quick_gelu")),
    "no mask embedding": (
        "AudioModel",
        dict(mask_time_prob=0.0, num_hidden_layers=1, apply_spec_augment=False),
    ),
    "mask embedding of channels": ("AudioModel", dict(mask_time_prob=0.0, mask_feature_prob=0.1)),
    "adapter": ("AudioModel", dict(add_adapter=True, output_hidden_size=10)),
    "adapter, other kernels": (
        "AudioModel",
        dict(add_adapter=True, num_adapter_layers=2, adapter_kernel_size=4, adapter_stride=3),
    ),
    "adapter, long steps": (
        "AudioModel",
        dict(add_adapter=True, adapter_kernel_size=5, adapter_stride=3, num_adapter_layers=2),
    ),
    "ctc, another blank": (
        "AudioForCTC",
        dict(pad_token_id=3, vocab_size=7, ctc_loss_reduction="mean", ctc_zero_infinity=True),
    ),
    "ctc, adapter": (
        "AudioForCTC",
        dict(add_adapter=True, num_adapter_layers=1, output_hidden_size=12, adapter_kernel_size=2),
    ),
    "ctc, adapter with a frame more than counted": (
        "AudioForCTC",
        dict(
            conv_kernel=[10, 4],
            add_adapter=True,
            num_adapter_layers=1,
            adapter_kernel_size=2,
            ctc_loss_reduction="mean",
        ),
    ),
    "utterances, all layers": (
        "AudioForSequenceClassification",
        dict(use_weighted_layer_sum=True, classifier_proj_size=7, num_labels=5),
    ),
    "frames, all layers": (
        "AudioForAudioFrameClassification",
        dict(use_weighted_layer_sum=True, num_labels=3),
    ),
    "x-vector": ("AudioForXVector", XVECTOR),
    "x-vector, all layers": (
        "AudioForXVector",
        XVECTOR
        | dict(
            use_weighted_layer_sum=True, tdnn_dim=[4, 6], tdnn_kernel=[2, 3], tdnn_dilation=[2, 1]
        ),
    ),
    "segments": (
        "TextModel",
        dict(type_vocab_size=3, pad_token_id=5, layer_norm_eps=1e-2, hidden_act="gelu_new"),
    ),
    "pad 0": ("TextModel", dict(pad_token_id=0, num_hidden_layers=3, hidden_act="relu")),
    "language model": ("TextForMaskedLM", dict(hidden_act="tanh", layer_norm_eps=1e-3)),
    "language model, output of its own": (
        "TextForMaskedLM",
        dict(tie_word_embeddings=False, pad_token_id=2),
    ),
    "sentences": ("TextForSequenceClassification", dict(num_labels=4, classifier_dropout=0.3)),
    "sentences, several labels": (
        "TextForSequenceClassification",
        dict(num_labels=3, problem_type="multi_label_classification"),
    ),
    "sentences, numbers": (
        "TextForSequenceClassification",
        dict(num_labels=2, problem_type="regression", type_vocab_size=2),
    ),
    "tokens": ("TextForTokenClassification", dict(num_labels=5, pad_token_id=4)),
    "answers": ("TextForQuestionAnswering", dict(type_vocab_size=2)),
    "choices": ("TextForMultipleChoice", dict(num_hidden_layers=1, type_vocab_size=2)),
}


def make(name):
    """Their model with random weights, norms and biases included."""
    kind, overrides = CASES[name]
    base = SPEECH if kind.startswith("Audio") else TEXT
    family = "Data2VecAudioConfig" if kind.startswith("Audio") else "Data2VecTextConfig"
    config = getattr(transformers, family)(**base | overrides, attn_implementation="eager")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"Data2Vec{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn_like(parameter))
        if kind == "TextForMaskedLM":  # of the two, one is never used
            model.lm_head.bias.copy_(model.lm_head.decoder.bias)
    return model


def inputs_of(model, random):
    """Runs of a model: (their arguments, labels)."""
    c, kind = model.config, type(model).__name__
    if "Audio" in kind:
        audio = random.normal(size=(3, 700)).astype(np.float32)
        attention = np.ones(audio.shape, np.int64)
        attention[1, 431:], attention[2, 57:] = 0, 0
        run = {"input_values": audio, "attention_mask": attention}
        labels = {}
        frames = model._get_feat_extract_output_lengths(700).item()
        if kind.endswith("CTC"):
            choices = [i for i in range(c.vocab_size) if i != c.pad_token_id]
            labels["labels"] = random.choice(choices, (3, 4))
            labels["labels"][1, 2:], labels["labels"][2, 1:] = -100, c.pad_token_id
        elif "Frame" in kind:
            labels["labels"] = np.eye(c.num_labels)[random.integers(0, c.num_labels, (3, frames))]
        elif not kind.endswith("Model"):
            labels["labels"] = random.integers(0, c.num_labels, 3)
        runs = [({"input_values": audio}, labels), (run, labels)]
        if kind.endswith("Model") and hasattr(model, "masked_spec_embed"):
            frames = model._get_feat_extract_output_lengths(700, add_adapter=False).item()
            runs.append((run | {"mask_time_indices": random.random((3, frames)) < 0.4}, {}))
        return runs
    shape = (2, 3, 11) if "Choice" in kind else (3, 11)
    tokens = random.integers(6, c.vocab_size, shape)
    attention = np.ones(shape, np.int64)
    tokens[..., 1, 7:], attention[..., 1, 7:] = c.pad_token_id, 0
    tokens[..., 2, :3], attention[..., 2, :3] = c.pad_token_id, 0  # at the left
    labels = {}
    if "MaskedLM" in kind or "Token" in kind:
        classes = c.vocab_size if "MaskedLM" in kind else c.num_labels
        labels["labels"] = np.where(
            random.random(shape) < 0.5, -100, random.integers(0, classes, shape)
        )
    elif "Question" in kind:
        labels = {f"{end}_positions": np.array([0, 5, 60]) for end in ("start", "end")}
    elif "Sequence" in kind:
        labels["labels"] = random.integers(0, c.num_labels, 3)
        if c.problem_type and "single" not in c.problem_type:
            labels["labels"] = random.random((3, c.num_labels)).astype(np.float32).round(1)
    elif "Choice" in kind:
        labels["labels"] = random.integers(0, 3, 2)
    run = {"input_ids": tokens}
    if c.type_vocab_size > 1:
        run["token_type_ids"] = random.integers(0, c.type_vocab_size, shape)
    return [({"input_ids": tokens}, labels), (run | {"attention_mask": attention}, labels)]


INPUTS = {
    "input_values": ("audio", lambda x: x),
    "input_ids": ("tokens", lambda x: x.astype(np.int32)),
    "attention_mask": ("padding", lambda x: x == 0),
    "mask_time_indices": ("mask", lambda x: x),
    "token_type_ids": ("types", lambda x: x.astype(np.int32)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_and_bytes(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = ours.open_checkpoint(tmp_path / "theirs")
    ours.demand_whole(checkpoint)
    config, params = checkpoint.config, jax.tree.map(jnp.asarray, nest(checkpoint.tree()))

    def program(params, inputs, labels):
        out = loaded.forward(config, params, inputs)
        return out, loaded.loss(config, params, out, labels) if labels else None

    forward, random = quick_jit(program), np.random.default_rng(0)
    for arguments, labels in inputs_of(model, random):
        out, loss = forward(
            params, {INPUTS[k][0]: INPUTS[k][1](v) for k, v in arguments.items()}, labels
        )
        given = {k: torch.tensor(v) for k, v in (arguments | labels).items()}
        with torch.no_grad():
            theirs = model(**given, output_hidden_states=True)
        compared = compare(out, theirs) + (loss is not None)
        if loss is not None:
            np.testing.assert_allclose(loss, theirs.loss, rtol=1e-4, atol=1e-4)
        assert compared == len(theirs), theirs.keys()
    there_and_back(model, checkpoint, tmp_path)


def compare(out, theirs):
    """Every output of theirs; returns how many."""
    count = 0
    for key, value in theirs.items():
        if key == "loss":
            continue
        own, count = getattr(out, key), count + 1
        for a, b in zip(own, value, strict=True) if key == "hidden_states" else ((own, value),):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-4, err_msg=key)
    return count


def there_and_back(model, checkpoint, tmp_path):
    """Through our folder to theirs, loaded by them: all tensors equal."""
    export.export(checkpoint, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "hf", "hf")
    again, report = type(model).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert {*state} == {*again.state_dict()}
    assert [k for k, x in again.state_dict().items() if not torch.equal(x, state[k])] == []
    new, old = (
        json.loads(Path(tmp_path / x / "config.json").read_text()) for x in ("hf", "theirs")
    )
    assert {k for k in old if new.get(k) != old[k]} == set()


def test_fairseq_has_one_segment(tmp_path):
    """The only segment's vector goes to the positions; several have no place."""
    for name in ("sentences", "sentences, numbers"):
        make(name).save_pretrained(tmp_path / name)
    checkpoint = ours.open_checkpoint(tmp_path / "sentences")
    written = export.export(checkpoint, tmp_path / "a.pt", "fairseq")
    assert [*written.dropped] == ["embeddings/types"]
    tokens = np.random.default_rng(0).integers(6, 31, (2, 9)).astype(np.int32)
    before, after = (loaded.load(tmp_path / x)(tokens).logits for x in ("sentences", "a.pt"))
    np.testing.assert_allclose(before, after, atol=1e-5)
    several = ours.open_checkpoint(tmp_path / "sentences, numbers")
    with pytest.raises(UserError, match="fairseq has one segment, not 2"):
        export.export(several, tmp_path / "b.pt", "fairseq")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(is_decoder=True), "'is_decoder' = True is not supported"),
        (dict(architectures=["Data2VecTextForCausalLM"]), "'Data2VecTextForCausalLM' is not supp"),
        (dict(architectures=["BertModel"]), "'BertModel' is not supported"),
        (dict(model_type="t5"), "not data2vec"),
        (dict(hidden_act="gelu_neu"), "activation: no 'gelu_neu'; did you mean"),
        (dict(hidden_size=20), "does not fit the config"),
        (dict(num_hidden_layers=5), "does not fit the config"),
        (dict(vocab_size=32), "'embeddings.word_embeddings.weight' does not fit the config"),
    ],
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
    make("pad 0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    files.write_json(tmp_path / "config.json", config | change)
    with pytest.raises(UserError, match=message):
        ours.open_checkpoint(tmp_path)
