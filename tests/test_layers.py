"""Layers against PyTorch's."""

import numpy as np
import pytest

from data2vec_jax.core.errors import UserError
from data2vec_jax.modalities.contract import build
from data2vec_jax.models.encoder import Encoder
from data2vec_jax.models.layers import ACTIVATIONS

torch = pytest.importorskip("torch")
ACT2FN = pytest.importorskip("transformers.activations").ACT2FN

LEARNED = {"prelu", "xielu"}  # have parameters of their own


def test_activations_are_those_of_hugging_face():
    x = np.linspace(-12, 12, 481, dtype=np.float32)
    for name in sorted({*ACT2FN} - LEARNED):
        theirs = ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(ACTIVATIONS[name](x), theirs, rtol=2e-6, atol=2e-6, err_msg=name)


def test_an_unknown_activation_is_named():
    options = dict(depth=1, heads=1, mlp=4, activation="gelu_neu")
    with pytest.raises(UserError, match=r"encoder.activation: no 'gelu_neu'; did you mean"):
        build(Encoder, "model.encoder", options, width=4)
