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

from data2vec_jax.convert import export, loaded, ours
from data2vec_jax.convert.layouts import Layout
from data2vec_jax.convert.ours import Checkpoint
from data2vec_jax.core import files
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.trees import nest
from data2vec_jax.models.outputs import OPTIONAL_OUTPUTS

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
        layout = export.layout_for(checkpoint.config, "hf")
        theirs = run_torch(target, layout, inputs)
    params = jax.tree.map(jnp.asarray, nest(checkpoint.tree()))
    out = loaded.forward(checkpoint.config, params, inputs)
    own = {f"layer {i}": x for i, x in enumerate(out.hidden_states)}
    own |= {name: getattr(out, name) for name in ("last_hidden_state", *OPTIONAL_OUTPUTS)}
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
    config, rng = checkpoint.config, np.random.default_rng(0)
    model, inference = ours.model_of(config), ours.inference_of(config)
    if inference.random_inputs is not None:
        return dict(inference.random_inputs(config, model, rng))
    return {
        name: rng.normal(size=(2, *array.shape[1:])).astype(array.dtype)
        for name, array in inference.example(model).items()
    }


def run_torch(folder: Path, layout: Layout, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the exported model, 'layer i' for its hidden states. inputs: ours."""
    import torch

    arrays = {name: np.ascontiguousarray(x) for name, x in layout.arguments(inputs).items()}
    arguments = {name: torch.from_numpy(x) for name, x in arrays.items()}
    config = files.read_json(folder / "config.json")
    with torch.no_grad():
        if "auto_map" in config:
            path = folder / "modeling_data2vec2.py"
            spec = importlib.util.spec_from_file_location("exported_data2vec2", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            out = module.Data2Vec2.load(folder)(**arguments)
        else:
            model = transformers_model(folder, config)
            out = model(**arguments, output_hidden_states=True)
    found = {f"layer {i}": x.numpy() for i, x in enumerate(out["hidden_states"])}
    for key in ("last_hidden_state", *OPTIONAL_OUTPUTS):
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
