"""A workdir -> one HTML page with curves and tables, readable without a network.

    python -m data2vec_jax.report WORKDIR

writes WORKDIR/report.html. A workdir is one run (config.json, metrics.jsonl), or the folder of a
demo: `summary.json` and one run for each modality and seed in `*/seed*/`. The pictures are SVG
written right here, so the page is one small file: no script, no font, no image to load.
"""

from data2vec_jax.cli.arguments import run_main
from data2vec_jax.report.page import main

if __name__ == "__main__":
    run_main(main)
