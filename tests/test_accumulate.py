"""Gradient accumulation equals the large batch: in float32, and to rounding in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOAT64 = """
import sys; sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from data2vec_jax import parallel, train
from data2vec_jax.tasks import pretrain
from test_step import config_of, quiet

pretrain.DTYPES["float32"] = jnp.float64
name = sys.argv[1]
finals = []
for parts in (1, 4):
    config = quiet(config_of(name)) | {"accumulate": parts}
    mesh = parallel.make_mesh(2, 1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        run = train.Run(config, pretrain.make(config), mesh)
        wide = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
        state = jax.tree.map(wide, run.init(0))
        step, losses = jax.jit(run.train_step), []
        for _, batch in zip(range(3), pretrain.make(config).data(0)):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
    finals.append(jax.device_get((losses, state.params, state.teacher)))
for a, b in zip(*map(jax.tree.leaves, finals)):
    assert np.asarray(a).dtype == np.float64
    error = np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-30)
    print(f"{error:.1e}")
    assert error < 1e-9 or np.abs(a - b).max() < 1e-15
"""


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("modality", ["speech", "vision", "text"])
def test_float64(modality, version):
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FLOAT64, f"{modality}_{version}"], env=env, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 20
