"""What the compiled train step of each smoke config must not exceed: messages and memory.

Both are promises: one exchange of gradients for each tensor or group of tensors and no more, and no
second copy of state or activations. Time, FLOPs and the number of kernels are XLA's affair.
"""

import re

import conftest  # noqa: F401  (sets the number of devices, also where this file runs alone)
import jax
import pytest
from configs_for_tests import config_of

from data2vec_jax.bench import measure
from data2vec_jax.core import sharding
from data2vec_jax.core.run import Run
from data2vec_jax.tasks import pretrain

# Of eight simulated CPU devices: all-reduces, and bytes at the peak on each.
STEPS = {
    "speech_v1": (11, 11.0e6),
    "speech_v2": (13, 12.9e6),
    "text_v1": (9, 2.4e6),
    "text_v2": (11, 3.0e6),
    "vision_v1": (9, 1.4e6),
    "vision_v2": (11, 1.5e6),
}
SPARE = 1.25  # of the bytes: versions of XLA place buffers in other ways
COLLECTIVES = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


@pytest.mark.parametrize("name", STEPS)
def test_the_compiled_step_sends_and_holds_no_more(name):
    config = config_of(name).to_dict()
    mesh = sharding.make_mesh(**config["mesh"])
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        program = Run(config, task, mesh).program(task.shapes[-1])
    messages, size = STEPS[name]
    found = re.findall(COLLECTIVES, program.as_text())
    assert set(found) == {"all-reduce"} and len(found) <= messages
    assert 0 < measure.peak_bytes(program) <= SPARE * size
