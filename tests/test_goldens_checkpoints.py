"""Every recorded checkpoint of other code bases: forward pass, and the way there and back.

The folder is named by DATA2VEC_CHECKPOINT_GOLDENS; each folder in it is a case, whose id is the
folder's name. A case is run by what is in it, never by its name; an output that nothing compares
fails.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import CHECKPOINT_CASES as CASES
from recorded import CHECKPOINTS as FOLDER
from recorded import SEGMENTATION, quick_jit

from data2vec_jax.convert import export, layouts, loaded, ours, peft, pickles
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.trees import flatten, nest
from data2vec_jax.modalities.speech import processor as speech
from data2vec_jax.modalities.text import tokenizer
from data2vec_jax.modalities.vision.processor import Processor

FORWARD, MERGED = 1e-4, 1e-6  # absolute
GRADIENT, NOISE = 1e-4, 1e-6  # shares of the tensor's largest value, and of the case's largest


@dataclasses.dataclass
class Golden:
    """A case: its folder, what is in meta.json, its arrays; and what was compared."""

    folder: Path
    meta: dict
    arrays: dict

    def __post_init__(self):
        self.left, self.worst, self.wrong = set(self.arrays), {}, []

    def take(self, name):
        self.left.discard(name)
        return self.arrays[name]

    def check(self, name, value, allowed=FORWARD, where=None):
        """Largest absolute difference. where: bool, leading axes, what counts."""
        theirs = self.take(name)
        if value is None or value.shape != theirs.shape:
            self.wrong.append(f"{name}: shape {getattr(value, 'shape', None)} for {theirs.shape}")
            return
        difference = np.abs(np.asarray(value, np.float64) - theirs)
        if where is not None:
            difference = difference[where]
        error = float(difference.max(initial=0.0))
        kind = re.sub(r"_?\d+$", "", name.split("/")[-1])
        kind = name.split("/")[0] if name.startswith(("grad/", "merged/")) else kind
        self.worst[kind] = max(self.worst.get(kind, 0.0), error)
        if not error <= allowed:
            self.wrong.append(f"{name}: {error:.2g} > {allowed:.2g}")

    def finish(self):
        assert not self.left, f"arrays that nothing compares: {sorted(self.left)[:5]}"
        assert not self.wrong, "; ".join(self.wrong[:8])


def golden(folder):
    meta = folder / "meta.json"
    arrays = {}
    if (folder / "golden.npz").exists():
        with np.load(folder / "golden.npz") as found:
            arrays = {name: found[name] for name in found.files}
    return Golden(folder, json.loads(meta.read_text()) if meta.exists() else {}, arrays)


def kind_of(folder):
    """What runs a case, by the files in it."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        return run_peft
    if {"config.json", "model.safetensors"} <= names:
        return run_hugging_face
    if names & {"checkpoint.pt", "checkpoint.pth"}:
        return run_pickle
    if "preprocessor_config.json" in names or "tokenizer_config.json" in names:
        return run_processor
    pytest.fail(f"{folder.name}: nothing here that the tests know")


@pytest.mark.parametrize("name", CASES)
def test_case(name, capsys, tmp_path):
    case = golden(FOLDER / name)
    kind_of(case.folder)(case, tmp_path)
    case.finish()
    with capsys.disabled():
        print(f"\n{name}: " + "  ".join(f"{k} {v:.1e}" for k, v in case.worst.items()))


def test_there_are_cases():
    assert CASES, f"no cases in {FOLDER}"


def tree_of(checkpoint):
    return jax.tree.map(jnp.asarray, nest(checkpoint.tree()))


# Hugging Face -------------------------------------------------------------------------------------

# Arguments of their forward functions -> ours; what is not here are labels.
INPUTS = {
    "input_values": ("audio", lambda x: x),
    "input_ids": ("tokens", lambda x: x.astype(np.int32)),
    "pixel_values": ("image", lambda x: x.transpose(0, 2, 3, 1)),
    "attention_mask": ("padding", lambda x: x == 0),
    "mask_time_indices": ("mask", lambda x: x.astype(bool)),
    "bool_masked_pos": ("mask", lambda x: x.astype(bool)),
    "token_type_ids": ("types", lambda x: x.astype(np.int32)),
    "interpolate_pos_encoding": ("interpolate", bool),
}


def arguments_of(case, run, arguments):
    """Inputs of a run by our names, and labels by theirs."""
    inputs, labels = {}, {}
    for name, value in arguments.items():
        value = case.take(f"in_{run}/{name}") if isinstance(value, str) else value
        if name in INPUTS:
            ours_, change = INPUTS[name]
            inputs[ours_] = change(value)
        else:
            labels[name] = value
    return inputs, labels


def run_hugging_face(case, tmp_path):
    checkpoint = ours.open_checkpoint(case.folder)
    ours.demand_whole(checkpoint)
    config, params = checkpoint.config, tree_of(checkpoint)
    allowed = SEGMENTATION if "Segmentation" in case.meta["cls"] else FORWARD
    for run, arguments in case.meta["runs"].items():
        inputs, labels = arguments_of(case, run, arguments)
        fixed = {k: v for k, v in inputs.items() if isinstance(v, bool)}
        arrays = {k: v for k, v in inputs.items() if k not in fixed}

        def run_it(params, arrays, labels, fixed=fixed):
            out = loaded.forward(config, params, arrays | fixed)
            return out, loaded.loss(config, params, out, labels) if labels else None

        out, loss = quick_jit(run_it)(params, arrays, labels)
        for name in sorted(name for name in case.left if name.startswith(f"{run}/")):
            what = name.removeprefix(f"{run}/")
            if found := re.fullmatch(r"hidden_states_(\d+)", what):
                value = out.hidden_states[int(found[1])]
            else:
                value = loss if what == "loss" else getattr(out, what)
            case.check(name, value, allowed)
    there_and_back(case, checkpoint, tmp_path)
    if (case.folder / "v4_keys.safetensors").exists():
        names_of_version_4(case, checkpoint, tmp_path)


def names_of_version_4(case, checkpoint, tmp_path):
    """The same weights under older names: the same tree, and the same names again."""
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(case.folder / "config.json", older)
    shutil.copy(case.folder / "v4_keys.safetensors", older / "model.safetensors")
    found = ours.open_checkpoint(older)
    ours.demand_whole(found)
    wanted, tree = checkpoint.tree(), found.tree()
    assert wanted.keys() == tree.keys() and all(same(wanted[k], tree[k]) for k in wanted)
    export.export(found, tmp_path / "older_again", "hf")
    before = safetensors.SafeTensors(older / "model.safetensors")
    after = safetensors.SafeTensors(tmp_path / "older_again/model.safetensors")
    assert {*before} == {*after} and all(same(before[k], after[k]) for k in before)


def there_and_back(case, checkpoint, tmp_path):
    """Theirs -> ours on disk -> theirs: the same bytes under the same names."""
    export.export(checkpoint, tmp_path / "jax", "jax")
    again = ours.open_checkpoint(tmp_path / "jax")
    assert again.config == json.loads(json.dumps(checkpoint.config))
    export.export(again, tmp_path / "hf", "hf")
    before = layouts.open_source(case.folder)
    after = layouts.open_source(tmp_path / "hf")
    tied = set(case.meta.get("state_dict_only", ()))  # in their models, not in their file
    assert set(before.state) <= set(after.state) <= set(before.state) | tied
    wrong = [name for name in before.state if not same(before.state[name], after.state[name])]
    assert not wrong
    copies = safetensors.SafeTensors(tmp_path / "hf/model.safetensors")
    assert copies.metadata == {"format": "pt"}
    changed = {k for k, v in before.config.items() if after.config.get(k) != v}
    assert not changed


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# fairseq and BEiT ---------------------------------------------------------------------------------


def run_pickle(case, tmp_path):
    checkpoint = ours.open_checkpoint(next(case.folder.glob("checkpoint.pt*")))
    ours.demand_whole(checkpoint)
    FAIRSEQ[checkpoint.config["modality"]](case, checkpoint, tree_of(checkpoint))
    pickle_and_back(checkpoint, tmp_path)


def program(checkpoint):
    return quick_jit(lambda params, inputs: loaded.forward(checkpoint.config, params, inputs))


def fairseq_speech(case, checkpoint, params):
    forward, prenet = program(checkpoint), checkpoint.config.get("prenet", 0)
    clean, padded, padding = (case.take(name) for name in ("x", "x_padded", "padding_mask"))
    for run, inputs in (
        ("nomask", {"audio": clean}),
        ("mask", {"audio": padded, "padding": padding}),
    ):
        out, where = forward(params, inputs), None
        if "padding" in inputs:
            where = np.arange(out.last_hidden_state.shape[1]) < out.features.lengths[:, None]
            if f"{run}/padding_mask" in case.left:
                np.testing.assert_array_equal(~where, case.take(f"{run}/padding_mask"))
        for name in sorted(name for name in case.left if name.startswith(f"{run}/")):
            what = name.removeprefix(f"{run}/")
            if found := re.fullmatch(r"(layer|ffn|lr)_(\d+)", what):
                kind, number = found[1], int(found[2])
                states = {"layer": out.hidden_states[1:], "ffn": out.ffn, "lr": out.ffn[prenet:]}
                value = states[kind][number]
            else:
                value = {"x": out.last_hidden_state, "logits": out.logits}[what]
            case.check(name, value, where=where)


def fairseq_text(case, checkpoint, params):
    tokens = case.take("ids").astype(np.int32)
    out = program(checkpoint)(params, {"tokens": tokens})
    valid = tokens != 1
    case.check("x", out.last_hidden_state, where=valid)
    if "logits" in case.left:
        case.check("logits", out.logits)
    if "regression" in case.left:
        model = ours.model_of(checkpoint.config)
        prediction = model.apply({"params": params}, out.last_hidden_state, method="predict")
        case.check("regression", prediction, where=valid)


def vision(case, checkpoint, params):
    forward, image = program(checkpoint), case.take("x").transpose(0, 2, 3, 1)
    out, model = forward(params, {"image": image}), ours.model_of(checkpoint.config)
    known = {
        "all_tokens": out.last_hidden_state,
        "patch": out.last_hidden_state[:, model.class_tokens :],
        "logits": out.logits,
        "features": out.last_hidden_state if out.logits is None else out.pooler_output,
    }
    known |= {f"end_{i}": x for i, x in enumerate(out.hidden_states[1:])}
    known |= {f"fc_{i}": x for i, x in enumerate(out.ffn)}
    if "mask" in case.left:
        mask = case.take("mask").astype(bool)
        masked = forward(params, {"image": image, "mask": mask}).last_hidden_state
        predicted = model.apply({"params": params}, masked[:, 1:][mask], method="predict")
        known |= {"features_masked": masked, "pred_masked": predicted}
    for name in sorted(case.left & known.keys()):
        case.check(name, known[name])


FAIRSEQ = {"speech": fairseq_speech, "text": fairseq_text, "vision": vision}


def pickle_and_back(checkpoint, tmp_path):
    """Their file -> ours on disk -> their file: the same settings, names and bytes."""
    export.export(checkpoint, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "file", "fairseq")
    before, after = pickles.read(checkpoint.path), pickles.read(tmp_path / "file")
    weights = next(key for key in ("model", "module") if key in before)
    a, b = (pickles.tensors(content[weights]) for content in (before, after))
    assert {*a} == {*b}
    assert [name for name in a if not same(a[name], b[name])] == []
    for key in ("cfg", "args"):
        assert pickles.plain(before.get(key)) == after.get(key)


# Adapters, processors -----------------------------------------------------------------------------


def run_peft(case, tmp_path):
    base = golden(FOLDER / case.meta["base"])
    checkpoint = ours.open_checkpoint(case.folder, base.folder)
    ours.demand_whole(checkpoint)
    config, params = checkpoint.config, tree_of(checkpoint)
    inputs, labels = adapter_run(case, base, checkpoint, params)

    def loss(adapters, params):
        out = loaded.forward(config, params | {"adapters": adapters}, inputs)
        return loaded.loss(config, params, out, labels), out

    program = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, out), grads = program(params["adapters"], params)
    case.check("logits", out.logits)
    case.check("loss", value)
    table = layouts.named(config["origin"]["layout"]).table(config)
    only = config | {"adapters": config["adapters"] | {"saved": {}}}
    entries = entries_of(flatten({"adapters": jax.tree.map(np.asarray, grads)}))
    gradients = largest(x for name, x in case.arrays.items() if name.startswith("grad/"))
    for entry in peft.tensors(only, entries, [], table):
        name = re.sub(r"(lora_[AB]|lora_magnitude_vector)", r"\1.default", entry.name)
        name = name if name.endswith(".weight") else f"{name}.weight"
        theirs = case.arrays[f"grad/{name}"]
        case.check(f"grad/{name}", entry.make(), GRADIENT * largest([theirs]) + NOISE * gradients)
    merged = export.merged(checkpoint)
    plain = quick_jit(lambda params: loaded.forward(merged.config, params, inputs))
    case.check("merged_logits", plain(tree_of(merged)).logits)
    written = {entry.name: entry for entry in export.export(merged, tmp_path / "hf", "hf").entries}
    for name in [name for name in case.left if name.startswith("merged/")]:
        case.check(name, written[name.removeprefix("merged/")].make(), MERGED)
    export.export(checkpoint, tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "peft", "peft")
    before, after = (
        safetensors.SafeTensors(folder / peft.WEIGHTS[0])
        for folder in (case.folder, tmp_path / "peft")
    )
    assert {*before} == {*after} and all(same(before[name], after[name]) for name in before)
    configs = [files.read_json(x / peft.CONFIG) for x in (case.folder, tmp_path / "peft")]
    assert configs[0] == configs[1]


def adapter_run(case, base, checkpoint, params):
    """Inputs and labels on which an adapter was recorded: the base's run that its case names.

    A case of another folder may name none: then its logits must be those of exactly one run.
    """
    runs = base.meta["runs"]
    if name := case.meta.get("run"):
        return arguments_of(base, name, runs[name])
    forward, wanted, found = program(checkpoint), case.arrays["logits"], []
    for name, arguments in runs.items():
        inputs, labels = arguments_of(base, name, arguments)
        logits = np.asarray(forward(params, inputs).logits)
        if logits.shape == wanted.shape and np.abs(logits - wanted).max() <= FORWARD:
            found.append((inputs, labels))
    assert len(found) == 1, f"{case.folder.name}: its logits are those of {len(found)} runs"
    return found[0]


def largest(arrays):
    return max((float(np.abs(x).max(initial=0.0)) for x in arrays), default=0.0)


def run_processor(case, tmp_path):
    folder = case.folder
    described, recorded, vocabulary = (
        files.read_json(folder / name) if (folder / name).exists() else None
        for name in ("preprocessor_config.json", "tokenizer_config.json", "vocab.json")
    )
    if described and "image_processor_type" in described:
        return run_images(case, described)
    if described:
        run_audio(case, described)
    if vocabulary and recorded["tokenizer_class"].startswith("Wav2Vec2CTC"):
        return run_letters(case, vocabulary, recorded)
    if vocabulary:
        return run_bpe(case)


def run_audio(case, described):
    processor = speech.Processor.of(described)
    names = sorted(name for name in case.arrays if name.startswith("raw"))
    audio, padding = processor([case.take(name) for name in names])
    case.check("input_values", audio)
    np.testing.assert_array_equal(case.take("attention_mask"), ~padding)
    ours = {k: v for k, v in processor.to_json().items() if k in described}
    assert ours == {k: v for k, v in described.items() if k != "processor_class"}


def run_letters(case, vocabulary, described):
    letters = speech.Letters.of(vocabulary, described)
    golden = files.read_json(case.folder / "decode_golden.json")
    assert [letters.decode(ids) for ids in golden["ids"]] == golden["batch_decode"]
    assert letters.encode(golden["text"]) == golden["text_ids"]
    # Which characters were outside the vocabulary was not recorded: any will do.
    names = {number: token for token, number in letters.ids.items()}
    text = "".join(
        {letters.unknown: "#", letters.word: " "}.get(names[n], names[n]) for n in golden["oov"]
    )
    assert letters.encode(text) == golden["oov"]
    assert letters.to_json() == described
    special = files.read_json(case.folder / "special_tokens_map.json")
    assert special == {k: v for k, v in letters.to_json().items() if k in special}


def run_bpe(case):
    ids, golden = tokenizer.load(case.folder), files.read_json(case.folder / "golden.json")

    def row(*texts):
        found = [ids.bos, *ids.encode(texts[0]), ids.eos]
        for text in texts[1:]:
            found += [ids.eos, *ids.encode(text), ids.eos]
        return found

    rows = [row(text) for text in golden["text"]]
    assert rows == golden["input_ids"] and row(*golden["pair"]) == golden["pair_ids"]
    assert [ids.decode(x) for x in rows] == golden["decoded"]
    size = max(map(len, rows))
    assert [x + [ids.pad] * (size - len(x)) for x in rows] == golden["padded"]
    masks = [[1] * len(x) + [0] * (size - len(x)) for x in rows]
    assert masks == golden["padded_mask"] and ids.vocab_size == len(ids_of(case))


def ids_of(case):
    return files.read_json(case.folder / "vocab.json")


def run_images(case, described):
    processor = Processor.of(described)
    for name in [name for name in case.arrays if name.startswith("image")]:
        pixels = processor(case.take(name)).transpose(2, 0, 1)[None]
        case.check(f"pixel_values{name.removeprefix('image')}", pixels, 1e-6)
    assert processor.to_json() == described
