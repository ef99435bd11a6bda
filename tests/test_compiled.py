"""What the compiled train step of each smoke config must not exceed: messages and memory; and the
order of its messages.

All are promises: one exchange of gradients for each tensor or group of tensors and no more, no
second copy of state or activations, and no two messages that might overtake each other. Time, FLOPs
and the number of kernels are XLA's affair.
"""

import functools

import conftest  # noqa: F401  (sets the number of devices, also where this file runs alone)
import jax
import pytest
from configs_for_tests import config_of

from data2vec_jax.bench import measure
from data2vec_jax.core import sharding
from data2vec_jax.core.run import Run
from data2vec_jax.plan import hlo
from data2vec_jax.tasks import pretrain

# Of eight simulated CPU devices: all-reduces, and bytes at the peak on each.
STEPS = {
    "sound_v2": (9, 2.4e6),
    "speech_v1": (9, 11.0e6),
    "speech_v2": (10, 12.9e6),
    "text_v1": (8, 2.4e6),
    "text_v2": (9, 3.0e6),
    "vision_v1": (8, 1.4e6),
    "vision_v2": (9, 1.5e6),
}
SPARE = 1.25  # of the bytes: versions of XLA place buffers in other ways


@functools.cache
def program_of(name):
    config = config_of(name).to_dict()
    mesh = sharding.make_mesh(**config["mesh"])
    with jax.set_mesh(mesh):
        task = pretrain.abstract_task(config)
        return Run(config, task, mesh).program(task.shapes[-1])


@pytest.mark.parametrize("name", STEPS)
def test_the_compiled_step_sends_and_holds_no_more(name):
    program = program_of(name)
    messages, size = STEPS[name]
    found = hlo.read(program.as_text()).collectives
    assert {c.kind for c in found} == {"all-reduce"} and len(found) <= messages
    assert 0 < measure.peak_bytes(program) <= SPARE * size


@pytest.mark.parametrize("name", STEPS)
def test_no_two_processes_can_start_its_messages_in_different_orders(name):
    assert hlo.unordered(program_of(name).as_text()) == []
