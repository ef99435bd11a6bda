"""Vision models of Hugging Face's library, made at random here, against ours with their weights.

B batch.
"""

import numpy as np
import pytest

from data2vec_jax.cli.arguments import parse
from data2vec_jax.convert import export, loaded, ours
from data2vec_jax.convert.tables import entries_of
from data2vec_jax.core import files, safetensors
from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.vision.processor import Processor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=24,
    patch_size=8,
    layer_norm_eps=1e-6,
    out_indices=[1, 2, 3, 4],
)
# class, fields, sizes of images (the first is the model's), labels
CASES = {
    "both biases, positions, mask": (
        "Model",
        dict(
            use_shared_relative_position_bias=True,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            use_mask_token=True,
            use_mean_pooling=False,
            hidden_act="gelu_new",
            num_channels=1,
            layer_norm_eps=1e-3,
            hidden_dropout_prob=0.1,
        ),
        [(24, 24), (40, 40), (16, 32), (27, 30)],
        None,
    ),
    "a grid that is not square": (
        "Model",
        dict(
            image_size=[24, 40],
            use_shared_relative_position_bias=True,
            use_relative_position_bias=True,
            use_mean_pooling=False,
        ),
        [(24, 40), (40, 24), (32, 32)],
        None,
    ),
    "positions of 2 x 8 patches": (
        "Model",
        dict(image_size=[16, 64], use_absolute_position_embeddings=True),
        [(16, 64), (32, 32), (24, 24)],
        None,
    ),
    "patches that are not square": (
        "Model",
        dict(image_size=24, patch_size=[8, 4], use_absolute_position_embeddings=True),
        [(24, 24)],
        None,
    ),
    "a rest of the image": (
        "Model",
        dict(image_size=[29, 29], use_relative_position_bias=True),
        [(29, 29), (24, 31)],
        None,
    ),
    "numbers": (
        "ForImageClassification",
        dict(
            layer_scale_init_value=-1.0,
            hidden_act="relu",
            num_labels=1,
            num_channels=4,
        ),
        [(24, 24), (32, 16)],
        "float",
    ),
    "classes by the class token": (
        "ForImageClassification",
        dict(
            use_mean_pooling=False,
            num_labels=5,
            hidden_act="silu",
            use_mask_token=True,
            use_shared_relative_position_bias=True,
        ),
        [(24, 24)],
        "class",
    ),
    "several classes": (
        "ForImageClassification",
        dict(num_labels=4, problem_type="multi_label_classification", hidden_act="quick_gelu"),
        [(24, 24)],
        "multi",
    ),
    "segmentation": (
        "ForSemanticSegmentation",
        dict(
            image_size=40,
            num_labels=6,
            pool_scales=[1, 2, 4],
            auxiliary_channels=7,
            auxiliary_num_convs=2,
            auxiliary_concat_input=True,
            auxiliary_loss_weight=0.7,
            semantic_loss_ignore_index=3,
            out_indices=[1, 2, 4, 3],
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,
        ),
        [(40, 40)],
        "pixel",
    ),
    "segmentation without the auxiliary head": (
        "ForSemanticSegmentation",
        dict(
            image_size=16,
            num_labels=3,
            use_auxiliary_head=False,
            use_relative_position_bias=True,
        ),
        [(16, 16)],
        "pixel",
    ),
}


def random_model(name):
    kind, changes, *rest = CASES[name]
    config = transformers.Data2VecVisionConfig(**(SIZES | changes))
    model = getattr(transformers, f"Data2VecVision{kind}")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if x.dtype == torch.int64:
                x.fill_(17)
            elif key.endswith(("running_var", "normalization.weight")):
                x.uniform_(0.5, 1.5)
            else:
                x.add_(torch.randn_like(x) * (0.5 if "bias_table" in key else 0.2))
    return model, *rest


def labels_of(kind, config, height, width, rng):
    C = config.num_labels
    return {
        "float": lambda: rng.normal(size=2).astype(np.float32),
        "class": lambda: rng.integers(0, C, 2),
        "multi": lambda: rng.integers(0, 2, (2, C)).astype(np.float32),
        "pixel": lambda: rng.integers(0, C, (2, height, width)),
    }[kind]()


@pytest.mark.parametrize("name", CASES)
def test_equals_hugging_face(name, tmp_path):
    model, sizes, labels = random_model(name)
    model.save_pretrained(tmp_path / "hf")
    found, rng = loaded.load(tmp_path / "hf"), np.random.default_rng(1)
    for number, (height, width) in enumerate(sizes):
        channels = model.config.num_channels
        image = rng.normal(size=(2, channels, height, width)).astype(np.float32)
        given, more = {}, {}
        grid = found_grid(found, height, width)
        if model.config.use_mask_token and labels is None:
            mask = rng.random((2, grid[0] * grid[1])) < 0.4
            given["bool_masked_pos"], more["mask"] = torch.tensor(mask), mask
        if number == 0 and labels:
            values = labels_of(labels, model.config, height, width, rng)
            given["labels"] = torch.tensor(values)
        with torch.no_grad():
            wanted = model(torch.tensor(image), output_hidden_states=True, **given)
        out = found(image.transpose(0, 2, 3, 1), **more)
        for ours_, theirs in zip(out.hidden_states, wanted.hidden_states, strict=True):
            close(ours_, theirs)
        for field in ("last_hidden_state", "logits"):
            if field in wanted:
                close(getattr(out, field), wanted[field], 5e-4 if labels == "pixel" else 1e-4)
        if "labels" in given:
            loss = loaded.loss(found.config, found.params, out, {"labels": values})
            close(loss, wanted.loss)


def found_grid(found, height, width):
    return ours.model_of(found.config).patches.grid(height, width)


def close(ours_, theirs, atol=1e-4):
    theirs = theirs.numpy()
    assert ours_.shape == theirs.shape
    np.testing.assert_allclose(ours_, theirs, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name, tmp_path):
    model, *_ = random_model(name)
    model.save_pretrained(tmp_path / "hf")
    export.export(ours.open_checkpoint(tmp_path / "hf"), tmp_path / "jax", "jax")
    export.export(ours.open_checkpoint(tmp_path / "jax"), tmp_path / "again", "hf")
    before, after = (
        safetensors.SafeTensors(tmp_path / x / "model.safetensors") for x in ("hf", "again")
    )
    assert {*before} == {*after}
    assert [k for k in before if before[k].tobytes() != after[k].tobytes()] == []
    old, new = (files.read_json(tmp_path / x / "config.json") for x in ("hf", "again"))
    assert {key for key in old if new.get(key) != old[key]} == set()
    again = type(model).from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(x, again[key]) for key, x in model.state_dict().items())


def test_heads_of_both_versions(tmp_path):
    """The segmentation heads of transformers 4 have other names; both are read and written."""
    model, *_ = random_model("segmentation")
    model.save_pretrained(tmp_path / "5")
    checkpoint = ours.open_checkpoint(tmp_path / "5")
    older = ours.Checkpoint(
        checkpoint.path, checkpoint.config | {"hf_major": 4}, checkpoint.entries
    )
    export.export(older, tmp_path / "4", "hf")
    names = {*safetensors.SafeTensors(tmp_path / "4/model.safetensors")}
    assert "decode_head.psp_modules.2.1.bn.running_var" in names
    assert "auxiliary_head.conv_cat.conv.weight" in names
    assert not [name for name in names if "convolution" in name or "normalization" in name]
    again = ours.open_checkpoint(tmp_path / "4")
    assert again.config["hf_major"] == 4
    wanted, found = checkpoint.tree(), again.tree()
    assert {*wanted} == {*found}
    assert all(wanted[path].tobytes() == found[path].tobytes() for path in wanted)


def test_the_processor_is_written(tmp_path):
    model, *_ = random_model("both biases, positions, mask")
    model.save_pretrained(tmp_path / "hf")
    export.export(ours.open_checkpoint(tmp_path / "hf"), tmp_path / "again", "hf")
    # Its PyTorch backend rounds otherwise: a few pixels differ by one.
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again", backend="pil")
    described = files.read_json(tmp_path / "again/preprocessor_config.json")
    assert described["size"] == {"height": 24, "width": 24} and described["image_mean"] == [0.5]
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    wanted = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(Processor.of(described)(image), wanted, atol=1e-6)


def test_a_pretraining_recipe_becomes_a_model_there(tmp_path):
    """vision 1.0 as configs/vision_v1.py has it, in small, with weights as if it had been trained;
    there and back."""
    config, _ = parse(["test", "--config=configs/vision_v1.py:smoke", "--workdir=-"])
    config = {"modality": "vision", "model": config["model"]}
    rng = np.random.default_rng(0)
    tree = {
        path: (0.2 * rng.normal(size=shape)).astype(np.float32)
        for path, shape in ours.shapes_of(config).items()
    }
    checkpoint = ours.Checkpoint(tmp_path, config, entries_of(tree))
    written = export.export(checkpoint, tmp_path / "hf", "hf")
    assert {*written.dropped} == {"head/linear0/kernel", "head/linear0/bias"}
    image = rng.normal(size=(2, 28, 28, 1)).astype(np.float32)
    mask = rng.random((2, 49)) < 0.5
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(image.transpose(0, 3, 1, 2)), bool_masked_pos=torch.tensor(mask)
        )
    found = loaded.load(tmp_path / "hf")(image, mask=mask).last_hidden_state
    close(found, wanted.last_hidden_state, 1e-5)
    back = ours.open_checkpoint(tmp_path / "hf").tree()
    assert all(np.array_equal(back[path], tree[path]) for path in back)
    assert {*tree} - {*back} == {*written.dropped}


def small(tmp_path, name="classes by the class token"):
    model, *_ = random_model(name)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_wrong_images_are_named(tmp_path):
    found = loaded.load(small(tmp_path))
    right = np.zeros((1, 24, 24, 3), np.float32)
    np.testing.assert_array_equal(found(right).logits, found(right.transpose(0, 3, 1, 2)).logits)
    for image, text in (
        (right[..., :2], "3"),
        (right[0], r"\(24, 24, 3\)"),
        (right[:, :4], "a patch has"),
    ):
        with pytest.raises(UserError, match=text):
            found(image)
    with pytest.raises(UserError, match="3 x 3 patches"):
        found(right, mask=np.zeros((1, 8), bool))


def test_what_has_no_place_is_refused(tmp_path):
    checkpoint = ours.open_checkpoint(small(tmp_path))
    config = checkpoint.config
    for place, value in (("encoder", {"norm": "post"}), ("sincos", True), ("image", [16, 32])):
        model = config["model"] | {"resampling": "grid"}
        new = model[place] | value if isinstance(value, dict) else value
        other = ours.Checkpoint(
            checkpoint.path, config | {"model": model | {place: new}}, checkpoint.entries
        )
        with pytest.raises(UserError, match=r"config\.model\."):
            export.export(other, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
