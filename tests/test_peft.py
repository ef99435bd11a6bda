"""Adapters of the PEFT library, made at random here, against ours; and ours in that library."""

import json
import shutil

import jax
import numpy as np
import pytest
from configs_for_tests import config_of

from data2vec_jax import train
from data2vec_jax.convert import __main__ as command
from data2vec_jax.convert import export, loaded, ours, peft
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import flatten
from data2vec_jax.modalities.text import tokenizer
from data2vec_jax.models import adapters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

TEXT = dict(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=20,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
)
VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=16,
    patch_size=8,
    use_relative_position_bias=True,
    num_labels=4,
)
AUDIO = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=20,
    conv_dim=(8, 8),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=2,
    conv_pos_kernel_size=3,
    num_conv_pos_embedding_groups=2,
    vocab_size=12,
    classifier_proj_size=8,
)
MODELS = {
    "text": ("Data2VecTextForSequenceClassification", TEXT),
    "image": ("Data2VecVisionForImageClassification", VISION),
    "ctc": ("Data2VecAudioForCTC", AUDIO),
    "utterance": ("Data2VecAudioForSequenceClassification", AUDIO),
}
CASES = {
    "ranks and strengths": (
        "text",
        dict(
            target_modules=["query", "key", "attention.output.dense"],
            rank_pattern={"key": 5},
            alpha_pattern={r"layer\.1\..*query": 11, "key": 2},
            lora_alpha=6,
        ),
    ),
    "rank-stabilised, some layers": (
        "text",
        dict(
            target_modules=["value", "intermediate.dense"],
            use_rslora=True,
            layers_to_transform=[0, 2],
        ),
    ),
    "a pattern, all biases": (
        "text",
        dict(
            target_modules=r".*layer\.[12]\..*(key|value)",
            bias="all",
            use_dora=True,
            task_type="SEQ_CLS",
        ),
    ),
    "biases of the adapted": (
        "text",
        dict(target_modules=["query", "dense"], bias="lora_only", exclude_modules=["pooler.dense"]),
    ),
    "all linear layers": ("image", dict(target_modules="all-linear", use_dora=True)),
    "trained beside": (
        "image",
        dict(
            target_modules=["key", "dense"],
            use_dora=True,
            modules_to_save=["classifier", "pooler"],
            rank_pattern={r"layer\.1\.intermediate\.dense": 4},
            layers_pattern="layer",
            layers_to_transform=1,
        ),
    ),
    "speech": (
        "ctc",
        dict(
            target_modules=["q_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"],
            use_dora=True,
            modules_to_save=["lm_head"],
        ),
    ),
    "speech, head": (
        "utterance",
        dict(
            target_modules=["k_proj", "projector", "feature_projection.projection"],
            modules_to_save=["classifier"],
        ),
    ),
}


def lively(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.15)
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base model of each kind, saved."""
    folder = tmp_path_factory.mktemp("bases")
    for kind, (name, options) in MODELS.items():
        cls = getattr(transformers, name)
        lively(cls(cls.config_class(**options))).save_pretrained(folder / kind)
    return folder


def base_model(bases, kind):
    return getattr(transformers, MODELS[kind][0]).from_pretrained(bases / kind)


def inputs_of(kind):
    """(their arguments, our input)."""
    rng = np.random.default_rng(3)
    if kind == "text":
        tokens = rng.integers(4, 30, (2, 9))
        return {"input_ids": torch.tensor(tokens)}, tokens
    if kind == "image":
        image = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
        return {"pixel_values": torch.tensor(image)}, image
    audio = rng.normal(size=(2, 300)).astype(np.float32)
    return {"input_values": torch.tensor(audio)}, audio


def logits(model, kind):
    with torch.no_grad():
        return model(**inputs_of(kind)[0]).logits.numpy()


def saved(bases, name, folder):
    """A random adapter, saved; returns its logits."""
    kind, options = CASES[name]
    model = theirs.get_peft_model(base_model(bases, kind), theirs.LoraConfig(r=3, **options))
    model = lively(model, 7) if options.get("bias") == "all" else random_adapter(model)
    model.save_pretrained(folder)
    if options.get("bias") == "all":  # the rest of the model must be the base that is on disk
        model = theirs.PeftModel.from_pretrained(base_model(bases, kind), folder).eval()
    return logits(model, kind)


def random_adapter(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(torch.randn_like(x) * 0.2)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_equals_peft(name, bases, tmp_path):
    kind, _ = CASES[name]
    wanted = saved(bases, name, tmp_path / "adapter")
    found = loaded.load(tmp_path / "adapter", base=bases / kind)
    np.testing.assert_allclose(found(inputs_of(kind)[1]).logits, wanted, atol=2e-5)
    checkpoint = ours.open_checkpoint(tmp_path / "adapter", bases / kind)
    export.export(checkpoint, tmp_path / "hf", "hf")  # merged
    merged = getattr(transformers, MODELS[kind][0]).from_pretrained(tmp_path / "hf").eval()
    np.testing.assert_allclose(logits(merged, kind), wanted, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, bases, tmp_path):
    kind, _ = CASES[name]
    wanted = saved(bases, name, tmp_path / "adapter")
    export.export(ours.open_checkpoint(tmp_path / "adapter", bases / kind), tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "again", "peft")
    before, after = (
        safetensors.SafeTensors(tmp_path / x / "adapter_model.safetensors")
        for x in ("adapter", "again")
    )
    # With bias="all" the library also writes tensors of the base, as `original_module`.
    wanted_names = {name for name in before if ".original_module." not in name}
    assert {*after} == wanted_names
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)
    again = theirs.PeftModel.from_pretrained(base_model(bases, kind), tmp_path / "again").eval()
    np.testing.assert_allclose(logits(again, kind), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_an_adapter_of_ours_runs_there(kind, bases, tmp_path):
    """Made here on an imported model, and its head trained along: loaded by the real library."""
    base = ours.open_checkpoint(bases / kind)
    found = loaded.load(bases / kind)
    targets = ["qkv/(query|value)$", "blocks/down$"]
    sites = adapters.find(found.params, targets=targets, rank=2, alpha=5, dora=kind == "image")
    rng = np.random.default_rng(0)
    leaves = adapters.init(jax.random.key(0), sites, found.params)
    leaves = jax.tree.map(
        lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32), leaves
    )
    names = [x.name for x in export.tensors(base, hf_layout(base)).entries]
    heads = {name: name for name in names if name.startswith("classifier")}
    section = {"sites": [peft.json_of(x) for x in sites], "saved": heads}
    checkpoint = Checkpoint(
        tmp_path,
        base.config | {"adapters": section},
        base.entries + entries_of(flatten({"adapters": leaves})),
    )
    export.export(checkpoint, tmp_path / "jax", "jax")
    wanted = loaded.load(tmp_path / "jax")(inputs_of(kind)[1]).logits
    assert np.abs(wanted - found(inputs_of(kind)[1]).logits).max() > 1e-2
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "adapter", "peft")
    base = base_model(bases, kind)
    encoder = base.data2vec_vision if kind == "image" else base.data2vec_text
    encoder.save_pretrained(tmp_path / "encoder")
    for place in (bases / kind, tmp_path / "encoder"):  # the head comes with the adapter
        again = loaded.load(tmp_path / "adapter", base=place)
        np.testing.assert_allclose(again(inputs_of(kind)[1]).logits, wanted, atol=2e-5)
    model = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(logits(model.eval(), kind), wanted, atol=2e-5)


def hf_layout(checkpoint):
    return export.layout_for(checkpoint.config, "hf")


def test_a_base_without_a_head(bases, tmp_path):
    """The base is an encoder; the head came with the adapter."""
    model = transformers.Data2VecTextForSequenceClassification.from_pretrained(bases / "text")
    model.data2vec_text.save_pretrained(tmp_path / "base")
    config = theirs.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapted = random_adapter(theirs.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter")
    found = loaded.load(tmp_path / "adapter", base=tmp_path / "base")
    tokens = inputs_of("text")[1]
    np.testing.assert_allclose(found(tokens).logits, logits(adapted, "text"), atol=2e-5)


def test_the_command(bases, tmp_path, capsys):
    saved(bases, "speech", tmp_path / "bases" / "adapter")
    shutil.copytree(bases / "ctc", tmp_path / "bases" / "base")
    config = files.read_json(tmp_path / "bases/adapter/adapter_config.json")
    config["base_model_name_or_path"] = "base"  # a sibling
    (tmp_path / "bases/adapter/adapter_config.json").write_text(json.dumps(config))
    source = str(tmp_path / "bases/adapter")
    command.main([source, str(tmp_path / "kept"), "--to=jax"])
    command.main([source, str(tmp_path / "merged"), "--to=jax", "--merge", "--verify"])
    assert "adapters/encoder/blocks/qkv/query/a" in capsys.readouterr().out
    audio = inputs_of("ctc")[1]
    kept, merged = (loaded.load(tmp_path / x) for x in ("kept", "merged"))
    assert "adapters" in kept.params and "adapters" not in merged.params
    np.testing.assert_allclose(kept(audio).logits, merged(audio).logits, atol=1e-5)


def test_wrong_folders_are_named(bases, tmp_path):
    saved(bases, "ranks and strengths", tmp_path / "adapter")
    config = files.read_json(tmp_path / "adapter/adapter_config.json")
    state = dict(safetensors.SafeTensors(tmp_path / "adapter/adapter_model.safetensors"))

    def refused(text, base=bases / "text", remove=None, add=None, **changes):
        left = {k: np.array(v) for k, v in state.items() if not remove or remove not in k}
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | changes))
        safetensors.write_safetensors(
            tmp_path / "adapter/adapter_model.safetensors", entries_of(left | (add or {})), {}
        )
        with pytest.raises(UserError, match=text):
            ours.open_checkpoint(tmp_path / "adapter", base)

    refused("the base model 'nowhere' is not here", None, base_model_name_or_path="nowhere")
    refused("'LOKR'", peft_type="LOKR")
    refused("'lora_bias' = True", lora_bias=True)
    refused("'init_lora_weights' = 'pissa'", init_lora_weights="pissa")
    refused(r"lacks '.*layer\.1\..*query\.lora_B\.weight'", remove="1.attention.self.query.lora_B")
    refused(r"lacks '.*layer\.1\..*query\.lora_A\.weight'", remove="1.attention.self.query")
    other = {
        "base_model.model.data2vec_text.embeddings.word_embeddings.lora_embedding_A": np.zeros(
            (3, 30), np.float32
        )
    }
    refused("word_embeddings.*not a linear layer", add=other)
    refused("classifier.novel", add={"base_model.model.classifier.novel": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match="not an adapter"):
        ours.open_checkpoint(bases / "text", bases / "text")
    with pytest.raises(UserError, match="has no adapters"):
        export.export(ours.open_checkpoint(bases / "text"), tmp_path / "out", "peft")


def test_adapters_trained_here_run_in_peft(tmp_path):
    """A checkpoint of theirs, converted, fine-tuned with DoRA in our loop, and back to PEFT."""
    texts = [{"text": text} for text in ("one two three", "four five six") * 200]
    tokenizer.train_sentencepiece((x["text"] for x in texts), 300).save(tmp_path / "tokenizer")
    cls = transformers.Data2VecTextForSequenceClassification
    options = TEXT | {"vocab_size": 320, "max_position_embeddings": 40, "num_labels": 2}
    lively(cls(cls.config_class(**options))).save_pretrained(tmp_path / "base")
    command.main([str(tmp_path / "base"), str(tmp_path / "start"), "--to=jax"])
    table = tmp_path / "table.jsonl"
    rows = [{"text": x["text"], "label": i % 2, "split": "train"} for i, x in enumerate(texts)]
    table.write_text("\n".join(json.dumps(row) for row in rows))
    config = config_of("finetune_text", "smoke")
    config.update(total_steps=3)
    config.head.classes = 2
    config.examples.update(lengths=(16,), tokenizer=str(tmp_path / "tokenizer"))
    config.data.update(source=f"manifest:{table}", eval_split="", share=1.0)
    config.adapter = dict(targets=("blocks/",), rank=2, alpha=4, dora=True)
    config.schedule.peak = 0.02
    config.model_overrides.encoder.update(dropout=0.0, attention_dropout=0.0)
    start, workdir = str(tmp_path / "start"), tmp_path / "workdir"
    train.train(config.to_dict(), workdir, init_from=start, verbose=False)
    command.main([str(workdir), str(tmp_path / "adapter"), "--to=peft"])

    tokens = np.random.default_rng(0).integers(4, 320, (2, 9))
    base = cls.from_pretrained(tmp_path / "base").eval()
    adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = adapted(input_ids=torch.tensor(tokens)).logits.numpy()
        plain = cls.from_pretrained(tmp_path / "base").eval()(input_ids=torch.tensor(tokens))
    found = loaded.load(workdir)(tokens, padding_mask=np.zeros(tokens.shape, bool)).logits
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert np.abs(plain.logits.numpy() - wanted).max() > 1e-2  # it has learned something
