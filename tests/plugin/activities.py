"""A simulated wrist: `python -m plugin.activities DIR` writes DIR/{train,test}/CLASS/NUMBER.npy."""

import sys
from pathlib import Path

import numpy as np

# Steps a second, phase between the axes, strength of the second harmonic, noise.
CLASSES = {
    "still": (0.2, 0.0, 0.0, 0.05),
    "walk": (1.8, 0.5, 0.3, 0.2),
    "run": (2.8, 0.5, 0.6, 0.4),
    "stairs": (1.8, 1.5, 0.6, 0.2),
    "cycle": (1.3, 1.57, 0.0, 0.3),
}


def series(kind, rng, samples=320, rate=50.0):
    """float32 [samples, 3]: a gait, in a sensor that is turned at random."""
    hertz, phase, second, noise = CLASSES[kind]
    angle = 2 * np.pi * (hertz * rng.uniform(0.9, 1.1) * np.arange(samples) / rate + rng.random())
    axes = [np.sin(angle + k * phase) + second * np.sin(2 * angle + k) for k in range(3)]
    turn, _ = np.linalg.qr(np.eye(3) + 0.3 * rng.standard_normal((3, 3)))
    return np.float32(np.stack(axes, 1) @ turn + noise * rng.standard_normal((samples, 3)))


for number in range(300 if __name__ == "__main__" else 0):
    label, split = number % len(CLASSES), "test" if number >= 200 else "train"
    file = Path(sys.argv[1], split, list(CLASSES)[label], f"{number}.npy")
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, series(list(CLASSES)[label], np.random.default_rng(number)))
