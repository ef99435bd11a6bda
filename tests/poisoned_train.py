"""The trainer, one of whose batches holds a number that spoils an update.

    python tests/poisoned_train.py WHERE VALUE STEPS OPTIONS...

In the updates STEPS (such as 3, or 3,4,5) the first example of the batch brings VALUE ('nan',
'inf', '1e38') along. WHERE it is added: to the 'example' (its input or, of tokens, its loss), or to
a 'gradient' of one weight, while the loss stays what it is.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from data2vec_jax import train
from data2vec_jax.data import batches
from data2vec_jax.tasks import pretrain

WHERE = ("example", "gradient")


@jax.custom_vjp
def spoil_gradient(weights, poison):
    """`weights`, whose gradient has `poison` added."""
    return weights


spoil_gradient.defvjp(
    lambda weights, poison: (weights, poison), lambda poison, g: (g + poison, jnp.zeros(()))
)


def poisonable(task):
    """`task`, whose loss reads float32 [B] `example` and `gradient` of the batch."""

    def loss(params, teacher, batch, draw):
        batch = dict(batch)
        example, gradient = (batch.pop(where) for where in WHERE)
        floats = [name for name, x in batch.items() if x.dtype == jnp.float32 and x.ndim > 1]
        for name in floats:
            rows = example.reshape(-1, *(1,) * (batch[name].ndim - 1))
            batch[name] = batch[name] + jnp.where(jnp.arange(batch[name].shape[-1]) == 0, rows, 0)
        leaves, tree = jax.tree.flatten(params)
        largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
        leaves[largest] = spoil_gradient(leaves[largest], jnp.sum(gradient))
        total, count, metrics = task.loss(jax.tree.unflatten(tree, leaves), teacher, batch, draw)
        return (total if floats else total + 1e3 * jnp.sum(example)), count, metrics

    return dataclasses.replace(task, loss=loss)


def poisoned(read, where, value, steps):
    """`HostBatchReader.__call__` whose batch n + 1 in `steps` is spoiled."""

    def wrapped(reader, n):
        batch = read(reader, n)
        ids = batch["example_id"]
        first = reader.sampler(int(n))[1][0]
        spoiled = (ids == first) & (int(n) + 1 in steps)
        for name in WHERE:
            amount = value if name == where else 0.0
            batch[name] = np.where(spoiled, amount, 0.0).astype(np.float32)
        return batch

    return wrapped


def install(where, value, steps, patch=setattr):
    """Has the trainer of this process run so."""
    make, read = pretrain.make, batches.HostBatchReader.__call__
    patch(pretrain, "make", lambda config: poisonable(make(config)))
    patch(batches.HostBatchReader, "__call__", poisoned(read, where, value, steps))


if __name__ == "__main__":
    install(sys.argv[1], float(sys.argv[2]), {int(n) for n in sys.argv[3].split(",")})
    train.main(["train", *sys.argv[4:]])
