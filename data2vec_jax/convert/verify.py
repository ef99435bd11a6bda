"""`--verify`: the checkpoint here and in PyTorch, on one random input.

Their side is what the checkpoint becomes when it is exported: transformers' class for data2vec 1.0,
the model file that we write beside the weights for 2.0.
"""

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax.convert import export, files, loaded, ours
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.convert.tables import nest
from data2vec_jax.core.errors import UserError

LIMIT = 1e-3  # of activations of order 1; float32 gives 1e-6 to 1e-4


def verify(checkpoint: Checkpoint) -> list[str]:
    """Lines with the worst difference of each layer and output.

    Raises UserError if PyTorch or transformers is not installed, or if a difference is too large.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--verify needs PyTorch: pip install torch transformers")
    inputs = random_inputs(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "export"
        export.export(checkpoint, target, "hf")
        theirs = run_torch(target, inputs)
    params = jax.tree.map(jnp.asarray, nest(checkpoint.tree()))
    out = loaded.forward(checkpoint.config, params, inputs)
    own = {f"layer {i}": x for i, x in enumerate(out.hidden_states)}
    own |= {name: getattr(out, name) for name in ("last_hidden_state", *loaded.HEAD_OUTPUTS)}
    lines, worst = [], 0.0
    for name, value in theirs.items():
        if own.get(name) is None or own[name].shape != value.shape:
            raise UserError(f"--verify: '{name}' has shape {value.shape} there, and not here")
        difference = float(np.abs(np.asarray(own[name], np.float64) - value).max(initial=0.0))
        worst = max(worst, difference)
        lines.append(f"{name:<20} {difference:.1e}")
    if not worst <= LIMIT:
        raise UserError("--verify: the models differ: " + "; ".join(lines))
    return lines


def random_inputs(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """A small batch that the checkpoint's model can read."""
    config, random = checkpoint.config, np.random.default_rng(0)
    model = ours.model_of(config)
    (name, shape), *_ = ours.example(config, model).items()
    if name == "tokens":
        length = min(12, config["model"]["max_length"])
        size = (2, 3, length) if _task(config) == "choice" else (2, length)
        special = max(4, config["model"].get("pad", 1) + 1)
        tokens = random.integers(special, config["model"]["vocab_size"], size, np.int32)
        return {"tokens": tokens}
    size = (2, shape.shape[1] * 3) if name == "audio" else (2, *shape.shape[1:])
    return {name: random.normal(size=size).astype(np.float32)}


def _task(config: Any) -> str | None:
    return (config.get("task") or {}).get("name")


ARGUMENTS = {"audio": "input_values", "tokens": "input_ids", "image": "pixel_values"}


def run_torch(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the exported model, 'layer i' for its hidden states."""
    import torch

    (name, array), *_ = inputs.items()
    array = array.transpose(0, 3, 1, 2) if name == "image" else array
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor.long() if name == "tokens" else tensor
    config = files.read_json(folder / "config.json")
    with torch.no_grad():
        if "auto_map" in config:
            path = folder / "modeling_data2vec2.py"
            spec = importlib.util.spec_from_file_location("exported_data2vec2", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            out = module.Data2Vec2.load(folder)(tensor)
        else:
            model = transformers_model(folder, config)
            out = model(**{ARGUMENTS[name]: tensor}, output_hidden_states=True)
    found = {f"layer {i}": x.numpy() for i, x in enumerate(out["hidden_states"])}
    for key in ("last_hidden_state", *loaded.HEAD_OUTPUTS):
        value = out.get(key) if hasattr(out, "get") else getattr(out, key, None)
        if value is not None:
            found[key] = value.numpy()
    return found


def transformers_model(folder: Path, config: Any) -> Any:
    """transformers' model of an exported folder; all tensors must have found their place."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--verify needs transformers: pip install transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise UserError(f"--verify: transformers found no weights for {wrong[0]}")
    return model.eval()
