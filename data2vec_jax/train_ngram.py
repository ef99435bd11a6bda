"""An n-gram language model of text, for the beam search of speech recognition.

    python -m data2vec_jax.train_ngram TEXT... --workdir=RUN --arpa=words.arpa.gz [--order=4]

TEXT: files with a sentence per line (*.gz too). RUN: a run of `tasks/transcribe.py`, to whose
characters the words are reduced. The units of the model are words, or characters
with --unit=character. `config.scoring.lm` and `evaluate --set scoring.lm=...` read its file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import run_main
from data2vec_jax.core.errors import UserError
from data2vec_jax.data.characters import SPACE, Characters
from data2vec_jax.tasks import ngrams
from data2vec_jax.tasks.transcribe import transcript_of


def sentences(path: Path, characters: Characters, unit: str) -> Iterator[list[str]]:
    """Units of each line of a file. Raises UserError: it cannot be read."""
    try:
        with ngrams.open_text(path, "r") as file:
            for line in file:
                words = transcript_of(line, characters, str(path)).split()
                if unit == "character":
                    words = [letter for word in words for letter in word + SPACE]
                if words:
                    yield words
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable text ({error})") from error


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
    parser.add_argument("--unit", choices=("word", "character"), default="word")
    options = parser.parse_args(argv)
    characters = Characters.load(options.workdir / "vocab.json")
    lines = [x for path in options.texts for x in sentences(path, characters, options.unit)]
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
