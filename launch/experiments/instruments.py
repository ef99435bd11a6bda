"""Notes of recorded instruments in soundfonts, for `corpora.py`: readers, classes, and splits.

A soundfont (SF2) holds samples, instruments that are made of samples, and presets that are made of
instruments; presets are numbered as the 128 programs of General MIDI. A GUS patch is one program.
"""

import hashlib
import itertools
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Programs of each class: families of General MIDI, but that sections of strings and the fiddle are
# strings, bagpipe and shenai reeds. Left out: what is synthetic (38, 39, 50, 51, 54, 62, 63, 80 to
# 103); the hit of an orchestra (55) and effects (120 to 127), which have nothing in common; voices
# (52, 53), harp and strings of the world (46, 104 to 108) and percussion (47, 112 to 119), which
# would be 50 to 90 notes each.
CLASSES: Mapping[str, Sequence[int]] = {
    "keyboard": range(8),
    "mallet": range(8, 16),
    "organ": range(16, 24),
    "guitar": range(24, 32),
    "bass": range(32, 38),
    "strings": (*range(40, 46), 48, 49, 110),
    "brass": range(56, 62),
    "reed": (*range(64, 72), 109, 111),
    "pipe": range(72, 80),
}
CLASS_OF = {program: name for name, programs in CLASSES.items() for program in programs}
SECTIONS = 44, 45, 49  # strings of an orchestra that play otherwise than in program 48
BANKS = 64  # those below are numbered as General MIDI; above are an older module, and drums
MONO, LEFT = 1, 4  # kinds of samples
INSTRUMENT, SAMPLE = 41, 53  # generators that say what a preset and an instrument are made of
ALIKE = 0.9  # correlation of two copies of one recording; of its two sides, often
LARGEST = 150  # notes of one instrument; one orchestra would be a fifth of all
HELD_OUT = {"test": 0.25, "dev": 0.1}  # at most, of the notes of a class


class Note(NamedTuple):
    """A sample: its program, int16 [n] of one channel, and its rate in hertz."""

    program: int
    audio: np.ndarray
    rate: int


def chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of the chunks of RIFF data, those within lists, too."""
    while start + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, start)
        inside = start + 8
        if name in (b"RIFF", b"LIST"):
            yield from chunks(data, inside + 4, inside + size)
        else:
            yield name, data[inside : inside + size]
        start = inside + size + size % 2


def soundfont(data: bytes) -> list[Note]:
    """The notes of an SF2 file that have a class, each once; of two sides the left one.

    A note's program is that of the lowest bank, and then number, that uses it. Notes that bank 0
    uses in several classes have none.
    """
    parts = dict(chunks(data, 0, len(data)))

    def table(name: bytes, layout: str) -> list[tuple]:
        return list(struct.iter_unpack(layout, parts[name]))

    presets, samples = table(b"phdr", "<20sHHHIII"), table(b"shdr", "<20sIIIIIBbHH")
    instruments = [first for _, first in table(b"inst", "<20sH")]
    of = used(instruments, table(b"ibag", "<HH"), table(b"igen", "<HH"), SAMPLE)
    bags, generators = table(b"pbag", "<HH"), table(b"pgen", "<HH")
    places: dict[int, set[tuple[int, int]]] = defaultdict(set)
    made_of = used([preset[3] for preset in presets], bags, generators, INSTRUMENT)
    for (_, program, bank, *_), inside in zip(presets[:-1], made_of, strict=True):
        if bank < BANKS:
            for sample in itertools.chain.from_iterable(of[part] for part in inside):
                places[sample].add((bank, program))
    notes = []
    for sample, at in sorted(places.items()):
        _, start, end, _, _, rate, _, _, _, kind = samples[sample]
        program = min(at)[1]
        classes = {CLASS_OF[p] for bank, p in at if bank == 0 and p in CLASS_OF}
        if program in CLASS_OF and len(classes) < 2 and kind in (MONO, LEFT) and start < end:
            audio = np.frombuffer(parts[b"smpl"], "<i2", end - start, 2 * start)
            notes.append(Note(program, audio, rate))
    return notes


def used(
    first: Sequence[int],
    bags: Sequence[tuple[int, int]],
    generators: Sequence[tuple[int, int]],
    kind: int,
) -> list[list[int]]:
    """What each preset, or instrument, is made of: the amounts of its generators of a kind.

    first: bag of each, and the end. bags: (first generator, ...). generators: (kind, amount).
    """
    starts = [bags[bag][0] for bag in first]
    return [
        [amount for what, amount in generators[start:end] if what == kind]
        for start, end in itertools.pairwise(starts)
    ]


def patch(data: bytes, program: int) -> list[Note]:
    """The notes of a GUS patch with one instrument."""
    notes, start = [], 239  # after the headers of the file, the instrument and its layer
    for _ in range(data[198]):
        size, rate, mode = struct.unpack_from("<8xI8xH33xB", data, start)
        start += 96
        wide, unsigned = mode & 1, mode & 2
        audio = np.frombuffer(data, "<u2" if wide else "u1", size // (2 if wide else 1), start)
        audio = audio if wide else audio.astype("<u2") << 8
        notes.append(Note(program, (audio ^ (0x8000 if unsigned else 0)).view("<i2"), rate))
        start += size
    return notes


def instrument(source: str, program: int) -> str:
    """The name of a recorded instrument: of a soundfont and a program of it."""
    return f"{source} {48 if program in SECTIONS else program}"


def distinct(names: Sequence[str], audio: Sequence[np.ndarray]) -> dict[int, str]:
    """Notes of a class without copies -> {index: instrument}.

    names: of the notes' instruments. audio: waveforms at 16 kHz. Instruments that share a recording
    are one; the first of them gives its name. Of a large one, some notes, evenly spaced.
    """
    spectra = np.stack([spectrum(wave) for wave in audio])
    size = 2 * (spectra.shape[1] - 1)
    same = {name: name for name in names}  # instrument -> an earlier one, or itself

    def root(name: str) -> str:
        return name if same[name] == name else root(same[name])

    copies: set[int] = set()
    for i, name in enumerate(names):
        if i not in copies:
            products = spectra[i] * spectra[i + 1 :].conj()
            alike = np.abs(np.fft.irfft(products, size)).max(1, initial=0) > ALIKE
            for j in (i + 1 + np.flatnonzero(alike)).tolist():
                copies.add(j)
                same[root(names[j])] = root(name)
    notes: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if i not in copies:
            notes[root(name)].append(i)
    step = {name: -(-len(some) // LARGEST) for name, some in notes.items()}
    return {i: name for name, some in notes.items() for i in some[:: step[name]]}


def spectrum(wave: np.ndarray) -> np.ndarray:
    """Complex spectrum [4097] of the first half second [S], at 8 kHz, of norm 1.

    The inverse transform of two, one of them conjugate, is their correlation at every shift.
    """
    half = wave[:8_000]
    half = half[: len(half) // 2 * 2].reshape(-1, 2).mean(1)
    return np.fft.rfft(half / np.linalg.norm(half), 8_192).astype(np.complex64)


def splits(instruments: Sequence[str]) -> dict[str, str]:
    """Instrument -> split, for the notes' instruments of a class.

    In the order of a hash, one goes to test or dev if it leaves the split within its share.
    """
    sizes, found = Counter(instruments), {}
    room = {split: share * len(instruments) for split, share in HELD_OUT.items()}
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        split = next((s for s in room if sizes[name] <= room[s]), "train")
        found[name] = split
        if split in room:
            room[split] -= sizes[name]
    return found
