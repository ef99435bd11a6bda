"""How texts are read; the published sets and shipped samples."""

from data2vec_jax.data.codecs import text
from data2vec_jax.modalities.text.published import open_ag_news, open_glue, open_squad
from data2vec_jax.modalities.text.samples import open_samples
from data2vec_jax.modalities.text.streams import open_lines, open_paragraphs, open_wikipedia

CODEC = text.codec(
    kinds={
        "ag_news": open_ag_news,
        "glue": open_glue,
        "lines": open_lines,
        "paragraphs": open_paragraphs,
        "samples": open_samples,
        "squad": open_squad,
        "wikipedia": open_wikipedia,
    }
)
