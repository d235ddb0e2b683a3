"""Build the small C programs which tests and benchmarks run."""

import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"


def build(source: Path) -> Path:
    """Compile one C file unless that has been done already, and return the program's path.

    Any number of processes may call this at the same time.  Raises RuntimeError with the
    compiler's message if it fails.
    """
    program = BUILD / source.stem
    # The program gets the time its source had before the compiler read it: an edit during the
    # compilation is then newer, too.
    modified = source.stat().st_mtime_ns
    try:
        if program.stat().st_mtime_ns >= modified:
            return program
    except FileNotFoundError:
        pass

    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=f".{source.stem}-") as directory:
        temporary = Path(directory, source.stem)
        _compile(source, temporary)
        os.utime(temporary, ns=(modified, modified))
        temporary.replace(program)
    return program


def _compile(source: Path, program: Path) -> None:
    command = ["cc", "-O2", "-o", os.fspath(program), os.fspath(source)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"cannot run {command[0]}: {error}") from error
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
