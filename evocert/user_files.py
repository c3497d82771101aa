"""A user's Python file: run as it stands, with the imports of its own folder, and with errors that name its lines."""

import contextlib
import functools
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from evocert.errors import InputError
from evocert.settings import plain


class UserFile:
    """A problem file.

    What it imports from its own folder is seen by its own code only: neither ``sys.path`` nor ``sys.modules`` is left
    changed, so that another file with a module of the same name beside it gets its own.

    Attributes:
        path: the file that is run.
        original: of which it is a copy, absolute: what ``__file__`` says.
        base: that one's folder, in which imports are looked up.
        source: the bytes that are run.

    Raises:
        InputError: it is no Python file, or cannot be read.
    """

    def __init__(self, path: Path, original: Path | None = None) -> None:
        if path.suffix != ".py":
            raise InputError(f"problem file {path}: allowed is a Python file (.py) that defines an experiment")
        try:
            self.source = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"problem file {path} cannot be read: {reason}") from error
        self.path = path
        self.original = (original or path).resolve()
        self.base = self.original.parent
        self._siblings: dict[str, types.ModuleType] = {}

    def run(self) -> dict[str, Any]:
        """Run the file; returns its names.

        Raises:
            InputError: it is no valid Python, or raises whatever it may.
        """
        name = "evocert_problem_" + hashlib.sha256(self.source + bytes(self.base)).hexdigest()[:16]
        module = types.ModuleType(name)
        module.__file__ = str(self.original)
        code = self._compiled()
        # Classes that the file defines must be found by name (pickling, dataclasses).
        sys.modules[name] = module
        try:
            with self._explained(), self._imports(), torch.random.fork_rng(devices=[]):
                # A module that the file builds has the same random weights whenever the file is run.
                torch.default_generator.manual_seed(0)
                exec(code, module.__dict__)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return module.__dict__

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the file to be called later, with the imports and the error messages of the file itself."""

        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._explained(), self._imports():
                return function(*args, **kwargs)

        call.__qualname__ = plain(function)
        return call

    def _compiled(self) -> types.CodeType:
        try:
            return compile(self.source, str(self.path), "exec", dont_inherit=True)
        except SyntaxError as error:
            line = "" if error.lineno is None else f", line {error.lineno}"
            raise InputError(f"problem file {self.path}{line}: no valid Python ({error.msg})") from error
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes, a thousand brackets
            what = str(error) or type(error).__name__
            raise InputError(f"problem file {self.path}: no valid Python ({what})") from error

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever the user's code raises, as one line that names the line in the file."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            trace, line = error.__traceback__, ""
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == str(self.path):
                    line = f", line {trace.tb_lineno}"
                trace = trace.tb_next
            text = " ".join(str(error).split())
            what = text if isinstance(error, InputError) else f"{type(error).__name__}{text and ': '}{text}"
            raise InputError(f"problem file {self.path}{line}: {what}") from error

    def imported(self) -> dict[str, str]:
        """The modules of its own folder that it has imported: name -> SHA-256 of the file."""
        found = {}
        for name, module in sorted(self._siblings.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_file():
                found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return found

    @contextlib.contextmanager
    def _imports(self) -> Iterator[None]:
        path, folder = list(sys.path), os.getcwd()
        sys.path.insert(0, str(self.base))
        importlib.invalidate_caches()
        hidden = {name: sys.modules[name] for name in self._siblings if name in sys.modules}
        sys.modules.update(self._siblings)
        others = sys.modules.keys() - self._siblings.keys()
        try:
            yield
        finally:
            sys.path[:] = path
            os.chdir(folder)  # what is relative on the command line was relative to it
            tops = {name.partition(".")[0] for name in sys.modules.keys() - others} - others
            tops = {name for name in tops if self._is_sibling(sys.modules.get(name), name)}
            self._siblings |= {
                name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops
            }
            sys.modules.update(hidden)

    def _is_sibling(self, module: types.ModuleType | None, name: str) -> bool:
        """Whether it lies in the base folder itself: a package installed below it does not."""
        folders = [str(folder) for folder in getattr(module, "__path__", None) or ()]
        file = getattr(module, "__file__", None)
        return str(self.base / name) in folders or (file is not None and Path(file).parent == self.base)
