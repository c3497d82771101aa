"""Files that are whole whatever happens, and folders that one process at a time works in."""

import contextlib
import fcntl
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from evocert.errors import InputError


class Lock:
    """Held until it is released, or its process ends.

    Args:
        path: of the lock file.
        refused: what a second process is told.

    Raises:
        InputError: another process holds it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, path: Path, refused: str) -> None:
        self.path = path
        while True:
            file = path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InputError(refused) from None
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its last holder removed it between the two calls
        self._file: io.TextIOWrapper | None = file

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is still held: nobody else's is removed
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def write_atomically(path: Path, content: bytes) -> None:
    """Whoever reads sees the old file or the new one, also after a power cut; what fails leaves no half of it.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_names(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_names(folder: Path) -> None:
    """After a power cut, too, a file is found under the name that it was given last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such thing
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_at_once(path: Path) -> Iterator[Path]:
    """``with folder_at_once(path) as folder:`` a folder to write in, which becomes ``path`` at the end, or else is removed.

    Raises:
        InputError: there is something at ``path`` that is no empty folder, or its parent cannot be written to.
        OSError: of the body, or of someone's having put something at ``path`` meanwhile; it names ``path``.
    """
    path = path.resolve()  # through links: a folder cannot take a link's place
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:6]}.tmp")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"folder {path}: there is a file of that name")
        if path.exists() and any(path.iterdir()):
            raise InputError(f"folder {path} is not empty: allowed is one that does not exist, or is empty")
        temporary.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"folder {path}: there is a file of the name of one of its parents") from error
    except OSError as error:
        raise InputError(f"folder {path} cannot be written to: {error.strerror}") from error
    try:
        yield temporary
        temporary.rename(path)
        sync_names(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # another process may have put something in a parent
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
