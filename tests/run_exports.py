"""Run by test_transformers in a process of its own: exported folders in the installed transformers.

    python run_exports.py FOLDER

FOLDER/plan.json lists what to load and what must come out of it; the last line of the output is
JSON, {case: worst difference or message}.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "0",
}

import numpy as np
import torch
import transformers


def load(folder, kind, **options):
    """The model with all of its weights found."""
    config = json.loads((folder / "config.json").read_text())
    if kind == "file":  # without transformers
        spec = importlib.util.spec_from_file_location(
            "model_file", folder / "modeling_data2vec2.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Data2Vec2.load(folder)
    remote = {"trust_remote_code": True} if "auto_map" in config else {}
    options |= {} if remote else {"attn_implementation": "eager"}
    model, found = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **remote, **options
    )
    lost = [*found["missing_keys"], *found["mismatched_keys"]]
    assert not [name for name in lost if "pooler" not in name or kind != "AutoModel"], lost
    assert not found["unexpected_keys"] or kind == "AutoModel", found["unexpected_keys"]
    return model.eval()


def tensor(value):
    found = torch.from_numpy(value)
    return found.long() if found.dtype == torch.int32 else found


def run(folder, case):
    """Worst difference over the runs of a case."""
    model, worst = load(folder / case["folder"], case["kind"], **case.get("options", {})), 0.0
    arrays = dict(np.load(folder / case["arrays"])) if case["runs"] else {}
    for name in case["runs"]:
        given = {k.split("/")[-1]: tensor(arrays[k]) for k in arrays if k.startswith(f"in/{name}/")}
        flags = {} if case["kind"] == "file" else {"output_hidden_states": True}
        positional = [given.pop(k) for k in ("inputs",) if k in given]
        with torch.no_grad():
            out = model(*positional, **given, **flags)
        where = arrays.get(f"where/{name}", ...)
        for key in arrays:
            if not key.startswith(f"out/{name}/"):
                continue
            what = key.split("/")[-1]
            if what == "pooler_output" and case["kind"] == "AutoModel" and what not in out:
                continue  # it leaves poolers out
            if what.startswith("hidden_states_"):
                value = out["hidden_states"][int(what.rsplit("_", 1)[1])]
            else:
                value = out[what]
            difference = np.abs(value.numpy().astype(np.float64) - arrays[key])
            difference = difference[where] if what not in ("loss", "pooler_output") else difference
            worst = max(worst, float(difference.max(initial=0.0)))
    if case.get("again"):  # saved by PyTorch, to be read back
        model.save_pretrained(folder / case["again"], safe_serialization=True)
    return worst


def processors(folder, case):
    """Names of what AutoProcessor and its relatives find."""
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(folder / case["folder"])
    name = type(found).__name__.replace("Fast", "").replace("Pil", "")
    assert name in case["processor"], name
    if "text" in case:
        ids = found(case["text"])["input_ids"]
        assert ids == case["ids"], (ids, case["ids"])
    if "transcript" in case:
        tokenizer = found.tokenizer
        assert tokenizer.decode(case["labels"]) == case["transcript"]
    return 0.0


def main(folder):
    results = {}
    plan = json.loads((folder / "plan.json").read_text())
    for case in [x for x in plan if transformers.__version__.startswith(x.get("version", ""))]:
        step = processors if "processor" in case else run
        try:
            results[case["name"]] = step(folder, case)
        except Exception as error:
            results[case["name"]] = f"{type(error).__name__}: {error}"
    print(json.dumps({"version": transformers.__version__, "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
