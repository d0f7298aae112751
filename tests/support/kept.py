"""What tests compile, kept in .pytest_cache until something that it is made of changes."""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock


def kept(request, name, made_of, make):
    """The folder that `make(folder)` fills, from an earlier run where there is one.

    made_of: all that the contents depend on: paths of files, and strings as flags or a compiler's
    version. `pytest --cache-clear` forgets everything, as does another file or string.
    """
    digest = hashlib.sha256()
    for part in made_of:
        for content in (str(part).encode(), part.read_bytes() if isinstance(part, Path) else b""):
            digest.update(len(content).to_bytes(8, "little") + content)
    if not hasattr(request.config, "cache"):  # -p no:cacheprovider
        folder = request.getfixturevalue("tmp_path_factory").mktemp(name)
        make(folder)
        return folder
    parent = request.config.cache.mkdir("compiled")
    folder = parent / f"{name}-{digest.hexdigest()[:32]}"
    with FileLock(parent / f"{name}.lock"):  # of two workers one makes it, and one waits
        if not folder.is_dir():
            for old in parent.glob(f"{name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(dir=parent))
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def version_of(*tools):
    """What tools say of themselves, for `made_of`, and the machine that they run on."""
    found = [
        subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        for tool in tools
    ]
    return [*found, platform.machine()]
