"""Schedules and AdamW against numbers recorded from the authors' code, and against numpy."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data2vec_jax import optim
from data2vec_jax.errors import UserError
from data2vec_jax.state import ema_decay

GOLDENS = Path(os.environ.get("DATA2VEC_GOLDENS", Path(__file__).parent / "goldens/pretraining"))
