"""Notes of instruments: readers of soundfonts and patches, copies of recordings, and splits."""

import importlib
import struct

import numpy as np

instruments = importlib.import_module("instruments")


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def soundfont(presets, made_of, samples):
    """An SF2 file. presets: (bank, program, instrument). made_of: samples of each instrument.
    samples: (audio, kind)."""
    pack, end = struct.pack, b"end"
    phdr = [pack("<20sHHHIII", b"p", p, b, i, 0, 0, 0) for i, (b, p, _) in enumerate(presets)]
    phdr.append(pack("<20sHHHIII", end, 0, 0, len(presets), 0, 0, 0))
    # Two generators in each bag: a range of keys, then what it is made of.
    pbag = [pack("<HH", 2 * i, 0) for i in range(len(presets) + 1)]
    pgen = [pack("<HHHH", 43, 0x7F00, 41, instrument) for *_, instrument in presets]
    first = np.cumsum([0, *map(len, made_of)])
    inst = [pack("<20sH", b"i", start) for start in first]
    ibag = [pack("<HH", 2 * i, 0) for i in range(first[-1] + 1)]
    igen = [pack("<HHHH", 43, 0x7F00, 53, sample) for some in made_of for sample in some]
    ends = np.cumsum([len(audio) for audio, _ in samples])
    shdr = [
        pack("<20sIIIIIBbHH", b"s", stop - len(audio), stop, 0, 0, 22_050, 60, 0, 0, kind)
        for (audio, kind), stop in zip(samples, ends, strict=True)
    ]
    tables = {b"phdr": phdr, b"pbag": pbag, b"pgen": [*pgen, bytes(4)], b"inst": inst}
    tables |= {b"ibag": ibag, b"igen": [*igen, bytes(4)], b"shdr": [*shdr, bytes(46)]}
    pdta = b"pdta" + b"".join(chunk(name, b"".join(rows)) for name, rows in tables.items())
    smpl = np.concatenate([audio for audio, _ in samples]).astype("<i2").tobytes()
    lists = chunk(b"LIST", b"INFO" + chunk(b"INAM", b"odd"))
    lists += chunk(b"LIST", b"sdta" + chunk(b"smpl", smpl)) + chunk(b"LIST", pdta)
    return chunk(b"RIFF", b"sfbk" + lists)


def test_notes_of_a_soundfont():
    left, right, mono, shared, drum = (np.arange(n) + n for n in (3, 4, 5, 6, 7))
    samples = [(left, 4), (right, 2), (mono, 1), (shared, 1), (drum, 1)]
    presets = [(8, 0, 0), (0, 40, 0), (0, 110, 0), (0, 25, 1), (0, 80, 1), (0, 3, 2), (128, 1, 3)]
    data = soundfont(presets, [[0, 1], [2, 3], [3], [4]], samples)
    notes = instruments.soundfont(data)
    # Without the right side, what piano and guitar share, and drums.
    assert [(note.program, note.rate) for note in notes] == [(40, 22_050), (25, 22_050)]
    np.testing.assert_array_equal(notes[0].audio, left)
    np.testing.assert_array_equal(notes[1].audio, mono)


def test_notes_of_a_patch():
    header = bytes(198) + b"\2" + bytes(40)

    def sample(content, mode):
        fields = struct.pack("<8xI8xH33xB", len(content), 11_025, mode)
        return fields + bytes(96 - len(fields)) + content

    wide = np.array([-(2**15), 0, 5], "<i2")
    data = header + sample((wide.view("<u2") ^ 0x8000).tobytes(), 3) + sample(b"\x80\1", 0)
    notes = instruments.patch(data, 60)
    assert [(note.program, note.rate) for note in notes] == [(60, 11_025)] * 2
    np.testing.assert_array_equal(notes[0].audio, wide)
    np.testing.assert_array_equal(notes[1].audio, [-(2**15), 256])


def test_copies_of_a_recording_are_found_and_make_instruments_one():
    noise = np.random.default_rng(0).normal(size=(3, 6_000)).astype(np.float32)
    copy = np.concatenate([np.zeros(100, np.float32), 0.3 * noise[0]])
    found = instruments.distinct(["a", "b", "c", "c"], [*noise, copy])
    assert found == {0: "a", 1: "b", 2: "a"}


def test_of_a_large_instrument_some_notes():
    noise = np.random.default_rng(0).normal(size=(2 * instruments.LARGEST - 10, 1_000))
    assert list(instruments.distinct(["a"] * len(noise), list(noise))) == [*range(0, len(noise), 2)]


def test_instruments_are_held_out_within_the_shares():
    names = [f"{i}" for i in range(40) for _ in range(1 + i % 5)] + ["large"] * 60
    split = instruments.splits(names)
    count = [[split[name] for name in names].count(s) for s in ("test", "dev")]
    assert split["large"] == "train" and count == [45, 18]
