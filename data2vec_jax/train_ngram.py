"""An n-gram language model of text, for the beam search of speech recognition.

    python -m data2vec_jax.train_ngram TEXT... --workdir=RUN --arpa=words.arpa.gz [--order=4]

TEXT: files with a sentence per line (*.gz too). RUN: a run of `tasks/transcribe.py`; the text is
written in its characters as its transcripts were. The units of the model are words, or characters
with --unit=character. `config.scoring.lm` and `evaluate --set scoring.lm=...` read its file.
"""

from collections.abc import Sequence
from pathlib import Path

from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import run_main
from data2vec_jax.core.errors import UserError
from data2vec_jax.data import normalise
from data2vec_jax.data.characters import SPACE
from data2vec_jax.tasks import ngrams


def read_lines(path: Path) -> list[str]:
    """Lines of a file. Raises UserError: it cannot be read."""
    try:
        with ngrams.open_text(path, "r") as file:
            return list(file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable text ({error})") from error


def units_of(text: str, unit: str) -> list[str]:
    """Words of a normalised sentence, or its characters with `|` after each word."""
    words = text.split()
    return words if unit == "word" else [letter for word in words for letter in word + SPACE]


def main(argv: Sequence[str] | None = None) -> None:
    """The command: see the module's docstring."""
    parser = Arguments(
        prog="python -m data2vec_jax.train_ngram", description="An n-gram language model of text."
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", type=user_path)
    parser.add_argument(
        "--workdir", required=True, metavar="RUN", type=user_path, help="whose characters are used"
    )
    parser.add_argument(
        "--arpa", required=True, metavar="FILE", type=user_path, help="is written; *.gz too"
    )
    parser.add_argument("--order", type=int, default=4, help="of the n-grams (default 4)")
    parser.add_argument(
        "--max-outside-share",
        type=float,
        default=normalise.MAX_OUTSIDE_SHARE,
        metavar="SHARE",
        help="of letters that are not among the run's (default %(default)s)",
    )
    parser.add_argument("--unit", choices=("word", "character"), default="word")
    options = parser.parse_args(argv)
    normaliser, lines = normalise.load(options.workdir), []
    for path in options.texts:
        texts = [line for line in read_lines(path) if not line.isspace()]
        survey = normaliser.survey(texts)
        print(survey.line(str(path)))
        survey.check(str(path), options.max_outside_share)
        lines += filter(None, (units_of(normaliser(text), options.unit) for text in texts))
    model = ngrams.train(lines, options.order)
    try:
        ngrams.write_arpa(model, options.arpa)
    except OSError as error:
        raise UserError(f"--arpa={options.arpa}: {error.strerror}") from None
    print(
        f"{options.arpa}: order {model.order}, {len(model.probs):,} n-grams of {len(lines):,} "
        f"sentences; perplexity on them {ngrams.perplexity(model, lines):.1f}"
    )


if __name__ == "__main__":
    run_main(main)
