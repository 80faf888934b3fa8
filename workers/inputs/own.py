"""A team's own architectures: a function that returns a network, named ``package.module:function``, and its code.

The code is installed wherever work is done, or travels as a zip of Python files that Python imports from
(docs.python.org/3/library/zipimport.html). Either way the code's digest is part of the job, and a machine that has
other code refuses the work. A manifest names the function and no more: what it names runs only where this process was
told to trust it (`use`, `trust`), never because a manifest says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from storage.digest import digest_bytes, digest_hex
from storage.files import open_regular
from storage.manifest import Digest
from storage.stores.uri import open_store
from workers.errors import ModelError, nearest, one_line
from workers.inputs.files import InputKind, reading
from workers.inputs.node_cache import own_folder
from workers.inputs.writing import write_pieces
from workers.tasks import Code

MAX_CODE_BYTES = 16 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
Factory = Callable[..., nn.Module]
_factories: dict[str, tuple[Factory, str | None]] = {}
_lock = threading.RLock()


def trust(entry: str, factory: Factory, *, digest: str | None = None) -> None:
    """Let ``entry`` be built in this process by ``factory``.

    Raises:
        ModelError: it was built by other code before; what was made of that could not be told apart.
    """
    with _lock:
        entered = _factories.get(entry)
        if entered is not None and digest is not None and entered[1] not in (None, digest):
            raise ModelError(f"{entry} was built by other code in this process before; start a new process.")
        _factories[entry] = (factory, digest)


def build(entry: str, arguments: dict[str, Any]) -> nn.Module:
    """Return the network that a trusted function builds.

    Raises:
        ModelError: nobody in this process said that it is to be trusted, or it returns no network. What the function
            itself raises passes.
    """
    registered = _factories.get(entry)
    if registered is None:
        raise ModelError(
            f"{entry} is an architecture of its publisher's own: its code does not come with the version, and is not "
            f"run because a manifest names it. Say where it is: --factory {entry}, with --code FILE where it is not "
            "installed (in Python: load(..., network=...))."
        )
    network = registered[0](**arguments)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{entry} returned a {type(network).__name__}; expected a torch.nn.Module.")
    return network


def use(code: Code) -> None:
    """Trust a function of code that the job's author gave, importing it where that was not done yet.

    Raises:
        ModelError: it cannot be imported here, has no such function, or is other code than the job's.
        storage.StorageError: the store refused to give it.
    """
    with _lock:
        registered = _factories.get(code.entry)
        if registered is not None and registered[1] == code.digest:
            return
        if code.key is not None:
            _importable(code)
        trust(code.entry, load_factory(code.entry), digest=code.digest)
        if code.key is None and (installed := installed_digest(code.entry)) != code.digest:
            del _factories[code.entry]
            raise ModelError(
                f"{code.entry}: this machine has other code than the one that submitted the job ({installed[:19]}, "
                f"expected {code.digest[:19]}); install the same release on all, or let it travel (model.code)."
            )


def load_factory(entry: str) -> Factory:
    """Import a module and return its function.

    Raises:
        ModelError: there is no such module or function, or the module raises.
    """
    module_name, _, name = entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise ModelError(
            f"model.factory {entry}: there is no module {missing!r} on this machine; install it wherever work is done, "
            "or let it travel: model.code: path/to/file.py."
        ) from error
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ModelError(f"model.factory {entry}: importing {module_name} failed: {one_line(error)}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [one for one in vars(module) if callable(getattr(module, one)) and not one.startswith("_")]
        raise ModelError(f"model.factory {entry}: {module_name} has no function {name!r}.{nearest(name, names)}")
    result: Factory = factory
    return result


def installed_digest(entry: str) -> Digest:
    """Return the digest of the file that defines an installed module: of it alone, not of what it imports.

    Raises:
        ModelError: it has no file of Python.
    """
    load_factory(entry)
    module = sys.modules[entry.partition(":")[0]]
    path = getattr(module, "__file__", None)
    if path is None or not path.endswith(".py"):
        raise ModelError(f"model.factory {entry}: its module has no .py file; expected a module written in Python.")
    return digest_bytes(Path(path).read_bytes())


CODE = InputKind(
    "code", "Python code", ModelError, "No code at {uri}: expected a .py file, a package's folder, or a .zip of them."
)


def pack(path: Path, uri: str) -> bytes:
    """Return a module's file, or a package's folder with its Python files, as a zip whose bytes follow from theirs.

    A .zip passes as it is. Links and what is no Python file stay out.

    Raises:
        ModelError: there is nothing, too much, or no package.
    """
    with reading(uri, CODE):
        if path.is_dir():
            if not (path / "__init__.py").is_file():
                raise ModelError(f"model.code: {uri} is a folder without __init__.py; expected a package or a file.")
            files = {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in sorted(path.rglob("*.py"))}
        elif path.suffix == ".py":
            files = {path.name: path}
        else:
            with open_regular(path) as stream:
                data = stream.read(MAX_CODE_BYTES + 1)
            if not zipfile.is_zipfile(io.BytesIO(data)):
                raise ModelError(f"model.code: {uri} is neither a .py file, a package's folder nor a .zip of them.")
            return _bounded(data, uri)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in files.items():
                if file.is_symlink():
                    continue
                with open_regular(file) as stream:
                    content = _bounded(stream.read(MAX_CODE_BYTES + 1), uri)
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED, 6)
    return _bounded(buffer.getvalue(), uri)


def _bounded(data: bytes, uri: str) -> bytes:
    if len(data) > MAX_CODE_BYTES:
        raise ModelError(
            f"model.code: {uri} is larger than {MAX_CODE_BYTES >> 20} MiB; give the network's own code alone."
        )
    return data


def _importable(code: Code) -> None:
    """Put the job's zip where Python looks for modules: under its digest, as modules are read from it long after the
    job's own folder is gone.
    """
    assert code.key is not None
    path = own_folder() / f"code-{digest_hex(code.digest)}.zip"
    if not path.is_file() or digest_bytes(path.read_bytes()) != code.digest:
        pieces = [Path(code.key).read_bytes()] if code.store is None else open_store(code.store).stream(code.key)
        write_pieces(pieces, path)
    if (digest := digest_bytes(path.read_bytes())) != code.digest:
        raise ModelError(f"{code.entry}: its code is {digest[:19]}, expected {code.digest[:19]}; submit the job again.")
    top = code.entry.partition(":")[0].partition(".")[0]
    module = sys.modules.get(top)
    if module is not None and not str(getattr(module, "__file__", "")).startswith(str(path)):
        raise ModelError(
            f"model.code: a module named {top!r} is loaded here already ({getattr(module, '__file__', 'built in')}); "
            "give yours another name."
        )
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    importlib.invalidate_caches()
