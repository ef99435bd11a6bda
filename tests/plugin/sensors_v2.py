"""data2vec 2.0 on sensor series: the demo's schedule with a model and data of our own."""

from data2vec_jax.configs import demo


def get_config(variant: str = ""):
    c = demo.get_config("speech,v2")
    c.update(modality="plugin", total_steps=120, averaged=("^norm/", "^encoder/"))
    encoder = dict(depth=3, heads=4, mlp=64, initializer="small")
    decoder = dict(layers=2, width=32, kernel=5, groups=4)
    c.model = dict(width=32, patch=8, encoder=encoder, decoder=decoder)
    c.mask = dict(kind="block_spans", ratio=0.6, adjust=0.05, width=3)
    c.objective.top_k = 2
    c.examples = dict(samples=256)
    c.data = dict(source="folder:runs/activities", split="train", batch_size=16)
    return c
