"""Where a command or a recipe gets its model from, as text.

========================  ==============================================================================
``module:callable``       imported from the working directory; ``path/to/file.py:callable`` works too
``program.pt2``           a program saved with ``torch.export.save``
``timm:NAME``             ``timm.create_model(NAME)``, random weights
``torchvision:NAME``      ``torchvision.models.get_model(NAME)``, random weights
``transformers:PATH``     a local directory with ``config.json``, and its weights where it holds them
``transformers:TYPE``     a model type (``bert``) in its default configuration, random weights
========================  ==============================================================================

A callable takes no arguments and returns a module, ``(module, example_inputs)`` or an exported program;
a module object itself will do as well. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, suggestion

RANDOM_WEIGHTS = "weights are random: the source names an architecture, not a checkpoint"
_FORMS = "module:callable, FILE.pt2, timm:NAME, torchvision:NAME or transformers:PATH_OR_TYPE"


@dataclass(frozen=True)
class Source:
    """A model and what its source says about it.

    Attributes:
        model: an ``nn.Module`` or an ``ExportedProgram``.
        example_inputs: as ``optimize`` takes them, ``None`` where the source gave none.
        notes: what a report should repeat.
    """

    model: Any
    example_inputs: Any = None
    notes: tuple[str, ...] = ()


def resolve(text: str, directory: str | Path = ".") -> Source:
    """The model that ``text`` stands for.

    Args:
        text: one of the forms in the module docstring.
        directory: what relative files and modules are relative to.

    Raises:
        SourceError: nothing, or something else than a model, is there; says what, and at which line.
        MissingExtraError: the model library is not installed.
    """
    base = Path(directory)
    if text.endswith(".pt2"):
        return Source(_program(base / text))
    kind, colon, name = text.partition(":")
    if colon and kind in _LIBRARIES and name:
        return _LIBRARIES[kind](name, base)
    if colon and name:
        return _called(load_object(text, directory), text)
    path = base / text
    if (path / "manifest.json").exists():
        raise SourceError(f"{text} is an artifact, not a model; use: graphprune inspect {text}")
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt"):
        raise SourceError(
            f"{text} holds weights, not a model; write a function that builds the model and loads them, "
            "and name it as module:function"
        )
    raise SourceError(f"cannot read the source {text!r}; use {_FORMS}")


def load_object(text: str, directory: str | Path = ".") -> Any:
    """The object that ``module:attribute`` or ``file.py:attribute`` names.

    Raises:
        SourceError: the module does not import (with the line at fault), or has no such attribute.
    """
    where, _, attribute = text.rpartition(":")
    if not where or not attribute:
        raise SourceError(f"{text!r} does not name an object; write module:attribute or file.py:attribute")
    module = _module(where, Path(directory).resolve(), text)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(module) if not n.startswith("_")]
            raise SourceError(f"{where} has no attribute {part!r}{suggestion(part, public)}")
        value = getattr(value, part)
    return value


def _module(where: str, base: Path, text: str) -> Any:
    importlib.invalidate_caches()
    try:
        if where.endswith(".py"):
            return _from_file(base / where, text)
        # The directory stays on the path: what the module imports later must be found as well.
        if str(base) not in sys.path:
            sys.path.insert(0, str(base))
        return importlib.import_module(where)
    except SourceError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise SourceError(
                f"there is no module {error.name!r} in {base} or on the path (source {text!r})"
            ) from error
        raise SourceError(f"source {text!r} does not import{_place(error)}: {error}") from error
    except Exception as error:
        raise SourceError(
            f"source {text!r} does not import{_place(error)}: {type(error).__name__}: {error}"
        ) from error


def _from_file(path: Path, text: str) -> Any:
    if not path.is_file():
        raise SourceError(f"there is no file {path} (source {text!r})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is not a Python file (source {text!r})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _called(value: Any, text: str) -> Source:
    import torch

    if not isinstance(value, torch.nn.Module) and callable(value):
        try:
            value = value()
        except Exception as error:
            raise SourceError(f"{text} failed{_place(error)}: {type(error).__name__}: {error}") from error
    inputs = None
    if isinstance(value, tuple) and len(value) == 2:
        value, inputs = value
    if not isinstance(value, (torch.nn.Module, torch.export.ExportedProgram)):
        raise SourceError(
            f"{text} gives {type(value).__name__}; it must give an nn.Module, (module, example_inputs) "
            "or an exported program"
        )
    return Source(value, inputs)


def _place(error: BaseException) -> str:
    from .capture import user_line

    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    line = user_line(error)
    return f" at {line}" if line and "importlib" not in line else ""


def _program(path: Path) -> Any:
    import torch

    if not path.is_file():
        raise SourceError(f"there is no file {path}")
    try:
        return torch.export.load(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise SourceError(
            f"{path} is not a program saved with torch.export.save (by this torch, {torch.__version__}, "
            f"or an earlier one): {reason[0]}"
        ) from error


def _library(package: str, extra: str, purpose: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)
    try:
        return importlib.import_module(package)
    except Exception as error:
        raise SourceError(
            f"{package} is installed but does not import ({type(error).__name__}: {error}); "
            "install the build that belongs to this torch"
        ) from error


def _build(what: str, make: Callable[[], Any], names: Callable[[], Any]) -> Any:
    """Call a library's factory; an unknown name is answered with the nearest known one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()
    except Exception as error:
        kind, _, name = what.partition(":")
        known = list(names())
        if known and name not in known:
            raise SourceError(f"{kind} has no model {name!r}{suggestion(name, known)}") from error
        raise SourceError(f"{what} cannot be built: {type(error).__name__}: {error}") from error


def _timm(name: str, base: Path) -> Source:
    timm = _library("timm", "vision", f"the source timm:{name}")
    model = _build(f"timm:{name}", lambda: timm.create_model(name, pretrained=False), timm.list_models)
    return Source(model, None, (RANDOM_WEIGHTS,))


def _torchvision(name: str, base: Path) -> Source:
    _library("torchvision", "vision", f"the source torchvision:{name}")
    models = importlib.import_module("torchvision.models")
    model = _build(f"torchvision:{name}", lambda: models.get_model(name, weights=None), models.list_models)
    return Source(model, None, (RANDOM_WEIGHTS,))


def _transformers(name: str, base: Path) -> Source:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the library is imported
    transformers = _library("transformers", "text", f"the source transformers:{name}")
    folder = base / name
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SourceError(f"{folder} holds no config.json, so it is not a transformers model")
        return _build(f"transformers:{name}", lambda: _local_transformers(transformers, folder), lambda: ())
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    config = _build(
        f"transformers:{name}", lambda: transformers.AutoConfig.for_model(name), lambda: mapping.keys()
    )
    model = _build(
        f"transformers:{name}", lambda: transformers.AutoModel.from_config(config), lambda: mapping.keys()
    )
    return Source(model, None, (RANDOM_WEIGHTS,))


def _local_transformers(transformers: Any, folder: Path) -> Source:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architectures: list[str] = getattr(config, "architectures", None) or []
    kind = getattr(transformers, architectures[0], None) if architectures else None
    kind = kind or transformers.AutoModel
    if any(folder.glob("*.safetensors")):
        return Source(kind.from_pretrained(folder, local_files_only=True, use_safetensors=True))
    build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
    note = "weights are random: the directory holds no .safetensors file"
    return Source(build(config), None, (note,))


_LIBRARIES: Mapping[str, Callable[[str, Path], Source]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
