"""A workdir -> one HTML page with curves and tables, readable without a network.

    python -m data2vec_jax.report WORKDIR

writes WORKDIR/report.html. A workdir is one run (config.json, metrics.jsonl), or the folder of a
demo: `summary.json` and one run for each recipe and seed in `*/seed*/`; or the folder of a
reference run, whose page has pictures of what its checkpoints make of held-out examples; or that of
a study of `python -m data2vec_jax.ablate`. The page is one file without scripts; it loads nothing,
and follows the browser's light or dark mode.
"""

from data2vec_jax.cli.output import run_main
from data2vec_jax.report.page import main

if __name__ == "__main__":
    run_main(main)
