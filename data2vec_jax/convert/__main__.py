"""Converts a checkpoint.

    python -m data2vec_jax.convert SOURCE TARGET --to={jax,hf,fairseq,peft} [--verify]

SOURCE: our workdir or a folder that this command wrote, a Hugging Face folder, fairseq's .pt, the
1.0 vision code base's .pth, or a PEFT adapter; the format is detected automatically. TARGET: a new
folder, or a new file for --to=fairseq. Prints a line for every tensor.
"""

import re
from collections.abc import Sequence

from data2vec_jax.cli.arguments import Arguments, user_path
from data2vec_jax.cli.output import run_main
from data2vec_jax.convert import export, ours, report, verify
from data2vec_jax.core.errors import UserError


def parser() -> Arguments:
    """The command's arguments."""
    found = Arguments(
        prog="python -m data2vec_jax.convert",
        description="Converts a checkpoint. Prints a line for every tensor.",
    )
    found.add_argument(
        "source",
        metavar="SOURCE",
        type=user_path,
        help="our workdir or a folder that this command wrote, a Hugging Face folder, fairseq's "
        ".pt, the 1.0 vision code base's .pth, or a PEFT adapter; the format is detected",
    )
    found.add_argument(
        "target", metavar="TARGET", type=user_path, help="a new folder; a new file for --to=fairseq"
    )
    found.add_argument(
        "--to",
        required=True,
        choices=export.TARGETS,
        help="jax: our own folder; hf: a Hugging Face folder; fairseq: its .pt, or the .pth of the "
        "1.0 vision code base; peft: a folder with its adapters",
    )
    found.add_argument(
        "--base",
        type=user_path,
        metavar="FOLDER",
        help="of an adapter: its base model, if it is not where the adapter says",
    )
    found.add_argument(
        "--merge",
        action="store_true",
        help="with --to=jax: merge adapters into the kernels (hf and fairseq always have them so)",
    )
    found.add_argument(
        "--verify",
        action="store_true",
        help="run the model here and in PyTorch, and print the worst difference of each layer",
    )
    found.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="teacher: put the moving average in the student's place",
    )
    found.add_argument(
        "--missing",
        metavar="PATTERN",
        action="append",
        default=[],
        type=pattern,
        help="a regular expression of our paths that the source may lack",
    )
    return found


def pattern(text: str) -> str:
    """`text`, if it is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"--missing={text}: not a regular expression ({error})") from None
    return text


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.target.exists():
        raise UserError(f"{options.target} exists; remove it, or choose another target")
    checkpoint = ours.open_checkpoint(options.source, options.base)
    if options.weights == "teacher":
        checkpoint = ours.of_teacher(checkpoint)
    ours.demand_whole(checkpoint, tuple(options.missing))
    checkpoint = export.merged(checkpoint) if options.merge else checkpoint
    lines = verify.verify(checkpoint) if options.verify else []
    written = export.export(checkpoint, options.target, options.to)
    for line in report.report(
        checkpoint, written.entries, written.dropped, ours.missing(checkpoint)
    ):
        print(line)
    for line in lines:
        print(f"difference   {line}")
    print(f"wrote {options.target}")


if __name__ == "__main__":
    run_main(main)
