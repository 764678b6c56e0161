"""docs/configuration.md, out of the declarations in sections.py.

`python -m forecaster.reference > docs/configuration.md` writes it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import inspect as types

from forecaster import sections
from forecaster.sections import Config, live_keys

_HEAD = """\
# Configuration

Written by `python -m forecaster.reference > docs/configuration.md`; do not edit.

Order, later wins: the defaults below, the file, the environment, flags.

| | `group_id` | `threshold` of the input `ticks` |
|---|---|---|
| in the file | `group_id = "night"` under `[kafka]` | `signal = { threshold = 0.6 }` under its `[[inputs]]` |
| in the environment | `FORECASTER__KAFKA__GROUP_ID=night` | `FORECASTER__INPUTS__TICKS__SIGNAL__THRESHOLD=0.6` |
| as a flag | `--set kafka.group_id=night` | `--set inputs.ticks.signal.threshold=0.6` |

`forecaster check` names the first mistake in one line; `forecaster check --show` prints what holds in the end.

**Secrets** are no keys: what a key `x_file` names is a file with the secret `x` alone in it. Without that key it is
taken from the environment (`FORECASTER__KAFKA__SASL_PASSWORD`) or from systemd's credentials
(`LoadCredential=kafka.sasl_password:/etc/forecaster/password`). No log, error or page ever has it: `***` stands there.

**Live** keys can be changed while the daemon runs: change the file and send SIGHUP. The log says what was taken, and
what waits for a restart. What decides which records step a stream, such as `late`, waits on purpose: after a crash
records are stepped again, and must be judged as they were before. A stop by SIGTERM leaves none to step again.
"""


def meanings(section: type[msgspec.Struct]) -> dict[str, str]:
    """The text under each key's declaration."""
    tree = ast.parse(inspect.getsource(sections))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    found = {}
    for declaration, text in pairwise(body):
        if (
            isinstance(declaration, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            assert isinstance(declaration.target, ast.Name)
            found[declaration.target.id] = " ".join(str(text.value.value).split())
    return found


def reference() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_sections(Config, "")]).rstrip() + "\n"


def _sections(section: type[msgspec.Struct], place: str) -> Iterator[str]:
    info = types.type_info(section)
    assert isinstance(info, types.StructType)
    inner: list[tuple[str, type[msgspec.Struct]]] = []
    rows: list[str] = []
    texts, live = meanings(section), live_keys(section)
    for field in info.fields:
        name = field.encode_name
        kind = field.type
        element = kind.item_type if isinstance(kind, types.VarTupleType) else kind
        if isinstance(element, types.StructType):
            inner.append((_inner(name, place, listed=element is not kind), element.cls))
            continue
        marks = "live" if field.name in live else ""
        rows.append(f"| `{name}` | {_kind(kind)} | {_default(field)} | {marks} | {texts[field.name]} |")
    if rows:
        doc = (section.__doc__ or "").strip()
        yield f"## {place}\n\n{doc}\n\n| key | type | default | | meaning |\n|---|---|---|---|---|"
        yield from rows
        yield ""
    for where, cls in inner:
        yield from _sections(cls, where)


def _inner(name: str, place: str, *, listed: bool) -> str:
    if listed:
        return f"[[{name}]]"
    return f"{place} {name}" if place else f"[{name}]"


def _kind(kind: types.Type) -> str:
    """A type and its range in words."""
    match kind:
        case types.Metadata():
            words = _kind(kind.type)
        case types.UnionType():
            words = _kind(next(each for each in kind.types if not isinstance(each, types.NoneType)))
        case types.LiteralType():
            words = ", ".join(f"`{value}`" for value in sorted(map(str, kind.values)))
        case types.VarTupleType():
            words = f"list of {_kind(kind.item_type)}"
        case types.DictType():
            words = f"table of {_kind(kind.value_type)}"
        case types.IntType() | types.FloatType():
            words = ("integer" if isinstance(kind, types.IntType) else "number") + _range(kind)
        case _:
            words = "`true`, `false`" if isinstance(kind, types.BoolType) else "string"
    return words


def _range(kind: Any) -> str:
    bounds = [(">= ", kind.ge), ("> ", kind.gt), ("<= ", kind.le), ("< ", kind.lt)]
    told = [
        f"{sign}{value:g}" if isinstance(value, float) else f"{sign}{value}"
        for sign, value in bounds
        if value is not None
    ]
    return f" {', '.join(told)}" if told else ""


def _default(field: types.Field) -> str:
    if field.required:
        return "*required*"
    value = field.default
    if value is msgspec.NODEFAULT:
        value = field.default_factory() if field.default_factory in (dict, list, tuple) else "the host's name"
        return "`{}`" if value == {} else str(value)
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return f"`{msgspec.json.encode(value).decode()}`"


if __name__ == "__main__":
    sys.stdout.write(reference())
