"""Schedules, AdamW, clipping and the teacher's decay against plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data2vec_jax.core import optimizer
from data2vec_jax.core.config import check_section
from data2vec_jax.core.errors import UserError
from data2vec_jax.core.state import Decay, ema_decay, ema_update, overlay, select
from data2vec_jax.core.train_step import choose


def make_optimizer(schedule, **options):
    return optimizer.make_optimizer(schedule, optimizer.OptimizerConfig(**options))


def test_cosine_rises_and_falls():
    rate = optimizer.make_schedule(1000, kind="cosine", peak=2.0, warmup=0.1, floor=0.5)
    assert float(rate(0)) == 0.0
    assert float(rate(50)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(2.0)
    assert float(rate(550)) == pytest.approx(1.25)
    assert float(rate(1000)) == pytest.approx(0.5)


def test_inclusive_warmup_is_numpys_linspace():
    rate = optimizer.make_schedule(100, kind="cosine", peak=3.0, warmup=0.2, inclusive=True)
    np.testing.assert_allclose([rate(n) for n in range(20)], np.linspace(0, 3, 20), rtol=1e-6)


def test_tri_stage_anchors_of_the_speech_recipe():
    rate = optimizer.make_schedule(
        400_000, kind="tri_stage", peak=5e-4, warmup=0.03, hold=0.9, decay=0.07
    )
    for step, value in ((0, 5e-6), (12_000, 5e-4), (372_000, 5e-4), (400_000, 5e-6)):
        assert float(rate(step)) == pytest.approx(value, rel=1e-5)
    assert float(rate(386_000)) == pytest.approx(5e-4 * 0.1, rel=1e-5)  # exponential, not linear


@pytest.mark.parametrize("kind", ["cosine", "tri_stage", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_hold_for_any_number_of_steps(kind, steps):
    shares = {"tri_stage": dict(warmup=0.03, hold=0.9, decay=0.07)}.get(kind, dict(warmup=0.5))
    rate = optimizer.make_schedule(steps, kind=kind, peak=1.0, **shares)
    values = np.array([rate(n) for n in range(steps + 1)])
    assert np.isfinite(values).all()
    assert (values >= 0).all() and (values <= 1).all()


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        optimizer.make_schedule(10, kind="cosin", peak=1.0)


def numpy_adamw(p, grads, lr, b1, b2, eps, decay, raw):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if raw:
            step = m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**t) / (1 - b1**t)
        else:
            step = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * decay * p - lr * step
    return p


@pytest.mark.parametrize("eps_on", ["raw", "corrected"])
def test_adamw_equals_numpy(eps_on):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3))
    grads = rng.normal(size=(5, 4, 3)) * np.logspace(-6, 0, 5)[:, None, None]
    tx = make_optimizer(
        lambda n: 0.01, betas=(0.9, 0.98), eps=1e-4, eps_on=eps_on, weight_decay=0.1
    )
    params = {"w": jnp.asarray(start, jnp.float32)}
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    wanted = numpy_adamw(start, grads, 0.01, 0.9, 0.98, 1e-4, 0.1, eps_on == "raw")
    other = numpy_adamw(start, grads, 0.01, 0.9, 0.98, 1e-4, 0.1, eps_on != "raw")
    np.testing.assert_allclose(params["w"], wanted, rtol=2e-5, atol=1e-7)
    assert np.abs(other - wanted).max() > 1e-3  # the two places of eps can be told apart


def test_lars_and_sgd_equal_numpy():
    rng = np.random.default_rng(0)
    start = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    grads = [{k: rng.normal(size=v.shape) for k, v in start.items()} for _ in range(4)]
    for kind, decay in (("lars", 0.0), ("lars", 0.1), ("sgd", 0.0), ("sgd", 0.1)):
        tx = make_optimizer(
            lambda n: 0.5, kind=kind, momentum=0.8, weight_decay=decay, no_decay=("^b$",)
        )
        params = {k: jnp.asarray(v, jnp.float32) for k, v in start.items()}
        state, wanted, speed = tx.init(params), dict(start), {"w": 0.0, "b": 0.0}
        for grad in grads:
            updates, state = tx.update(jax.tree.map(jnp.float32, grad), state, params)
            params = optax.apply_updates(params, updates)
            for k, g in grad.items():
                g = g + (decay * wanted[k] if k == "w" else 0)
                if kind == "lars" and k == "w":
                    g = g * 0.001 * np.linalg.norm(wanted[k]) / np.linalg.norm(g)
                speed[k] = 0.8 * speed[k] + g
                wanted[k] = wanted[k] - 0.5 * speed[k]
        for k, value in wanted.items():
            np.testing.assert_allclose(params[k], value, rtol=2e-5, atol=1e-6)
    # Stacked layers are as many matrices, and their biases and norms vectors.
    one = {"kernel": jnp.ones((2, 3, 4)).at[1].mul(100.0), "scale": jnp.ones((2, 3))}
    tx = make_optimizer(lambda n: 1.0, kind="lars", momentum=0.0)
    params, grads = (
        {"encoder": {"blocks": one}},
        {"encoder": {"blocks": jax.tree.map(jnp.ones_like, one)}},
    )
    steps = tx.update(grads, tx.init(params), params)[0]["encoder"]["blocks"]
    np.testing.assert_allclose(steps["kernel"][:, 0, 0], [-0.001, -0.1], rtol=1e-5)
    np.testing.assert_allclose(steps["scale"], -1.0)
    with pytest.raises(UserError, match=r"config.optim.kind: no 'lasr'; did you mean 'lars'"):
        check_section("optim", {"kind": "lasr"}, optimizer.OptimizerConfig)


def test_clip_no_decay_and_frozen():
    params = {"a": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones(3)}}
    tx = make_optimizer(
        lambda n: 0.1, weight_decay=0.5, no_decay=("bias$",), frozen=("^b/",), clip=1.0
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], 0)
    np.testing.assert_array_equal(updates["b"]["kernel"], 0)
    clip = optimizer.clip_by_norm(1.0)
    clipped, _ = clip.update({"w": jnp.array([3.0, 4.0])}, clip.init({}))
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-5)
    kept, _ = clip.update({"w": jnp.array([0.3, 0.4])}, clip.init({}))
    np.testing.assert_array_equal(kept["w"], jnp.array([0.3, 0.4]))


def test_clip_of_each_parameter():
    """Of stacked layers each by its own norm; the global norm would scale all alike."""
    random = np.random.default_rng(0)
    grads = {"encoder": {"blocks": {"w": random.normal(size=(3, 4, 5))}}, "v": np.ones(4) * 0.1}
    grads["encoder"]["blocks"]["w"] *= np.array([0.01, 1, 100])[:, None, None]
    clip = optimizer.clip_by_norm(3.0, each=True)
    found, _ = clip.update(jax.tree.map(jnp.float32, grads), clip.init({}))
    for own, g in zip(
        found["encoder"]["blocks"]["w"], grads["encoder"]["blocks"]["w"], strict=True
    ):
        factor = min(1, 3 / (np.linalg.norm(g) + 1e-6))
        np.testing.assert_allclose(own, g * factor, rtol=1e-5)
    np.testing.assert_allclose(found["v"], 0.1, rtol=1e-6)
    assert np.linalg.norm(found["encoder"]["blocks"]["w"][2]) == pytest.approx(3, rel=1e-5)


def test_weight_decay_has_a_schedule():
    """Half a cosine from 0.04 to 0.4; its clock goes on where an update is not applied."""
    steps, options = 10, dict(weight_decay=0.04, weight_decay_end=0.4, no_decay=("bias$",))
    config = optimizer.OptimizerConfig(**options)
    tx = optimizer.make_optimizer(lambda n: jnp.float32(0.1), config, steps)
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for n in range(steps):
        updates, new = tx.update(zero, state, params)
        decay = 0.4 - 0.18 * (1 + math.cos(math.pi * n / steps))
        np.testing.assert_allclose(updates["kernel"], -0.1 * decay, rtol=1e-5)
        np.testing.assert_array_equal(updates["bias"], 0)
        applied = n % 3 != 1
        state = choose(jnp.bool_(applied), new, state)
        assert int(state[0].count) == sum(m % 3 != 1 for m in range(n + 1))  # Adam's does not
    plain = optimizer.make_optimizer(lambda n: 0.1, optimizer.OptimizerConfig(weight_decay=0.04))
    assert len(jax.tree.leaves(plain.init(params))) == len(jax.tree.leaves(state)) - 1


def test_rates_by_path_and_by_stacked_layer():
    tx = make_optimizer(
        lambda n: jnp.float32(0.1), rates=(("^blocks/", (0.25, 0.5)), ("^table$", 0.0))
    )
    params = {"blocks": {"w": jnp.ones((2, 3))}, "head": jnp.ones(3), "table": jnp.ones(())}
    updates, _ = tx.update(params, tx.init(params), params)  # Adam's first direction is the sign
    np.testing.assert_allclose(updates["blocks"]["w"], [[-0.025] * 3, [-0.05] * 3], rtol=1e-5)
    np.testing.assert_allclose(updates["head"], [-0.1] * 3, rtol=1e-5)
    assert float(updates["table"]) == 0.0


def test_decay_of_the_teacher():
    decay = ema_decay(400_000, start=0.999, end=0.9999, anneal=30_000 / 400_000)
    for step, value in ((1, 0.99900003), (15_000, 0.99945), (30_000, 0.9999), (90_000, 0.9999)):
        assert float(decay(step).value) == pytest.approx(value, rel=1e-7)
    lagging = ema_decay(400_000, start=0.999, end=0.9999, anneal=30_000 / 400_000, lag=1)
    assert float(lagging(1).value) == pytest.approx(0.999, rel=1e-7)


def test_cosine_decay_of_the_teacher():
    """BYOL's and DINO's, 1 - (1 - start)(1 + cos(pi n / N)) / 2 after update n + 1, in float64."""
    steps = 250_000
    decay = ema_decay(steps, start=0.996, end=1.0, anneal=1.0, lag=1, kind="cosine")
    for n in (0, 1, 1_000, 125_000, 200_000, 249_900, 249_999):
        exact = 0.004 * math.cos(math.pi * n / (2 * steps)) ** 2
        assert float(decay(n + 1).complement) == pytest.approx(exact, rel=2e-4, abs=1e-14)
        assert float(decay(n + 1).value) == pytest.approx(1 - exact, rel=1e-7)
    assert float(decay(steps + 1).complement) == 0.0


@pytest.mark.parametrize("start, end", [(0.9997, 1.0), (0.999, 0.99999), (1.0, 0.999)])
def test_average_near_a_decay_of_one(start, end):
    """Against float64: 1 - decay below float32's step at 1 is neither doubled nor zero."""
    steps = 300_000
    decay = ema_decay(2 * steps, start=start, end=end, anneal=0.5)
    early, late = range(1, 60), range(steps - 60, steps + 3)
    for n in (*early, *late):
        exact = (1.0 - start) + (start - end) * min(n, steps) / steps
        assert float(decay(n).complement) == pytest.approx(exact, rel=1e-6, abs=1e-16)
        assert float(decay(n).value) == pytest.approx(1.0 - exact, rel=1e-7)

    # The teacher starts at zero, where float32 keeps even the smallest share of the student.
    student = {"w": jnp.float32(3.0)}
    teacher, wanted = {"w": jnp.float32(0.0)}, 0.0
    for n in late:
        teacher = ema_update(teacher, student, decay(n))
        share = (1.0 - start) + (start - end) * min(n, steps) / steps
        wanted = wanted + share * (3.0 - wanted)
    assert float(teacher["w"]) == pytest.approx(wanted, rel=1e-5)


def test_teacher_is_an_overlay_of_its_own_leaves():
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "b": jnp.ones(2)}
    teacher = select(params, ("^a/x",))
    assert jax.tree.leaves_with_path(teacher)[0][0][-1].key == "x" and "b" not in teacher
    student = jax.tree.map(lambda p: p * 3.0, params)
    teacher = ema_update(teacher, student, Decay(jnp.float32(0.75), jnp.float32(0.25)))
    whole = overlay(student, teacher)
    np.testing.assert_allclose(whole["a"]["x"], 0.75 * 1 + 0.25 * 3)
    np.testing.assert_allclose(whole["a"]["y"], 3.0)
    frozen = ema_update(teacher, student, Decay(jnp.float32(1.0), jnp.float32(0.0)))
    np.testing.assert_array_equal(frozen["a"]["x"], teacher["a"]["x"])
