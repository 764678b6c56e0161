"""The one place where TensorFlow is imported: quietly, and with the device chosen.

TensorFlow writes to the process's stderr before any of its settings can stop it
(absl logs ahead of its own initialisation), so the import runs with file descriptor
2 set aside; what was written is shown only if the import fails.
"""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from forecaster.errors import Fatal

DeviceChoice = Literal["auto", "gpu", "cpu"]
_CACHE_FLAG = "--tf_xla_persistent_cache_directory"


def _need_scratch_space() -> None:
    """Say what TensorFlow would say in forty lines: it wants a directory for temporary files, only to be imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise Fatal("nowhere to write temporary files: with a read-only root, mount a tmpfs at /tmp") from None


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    kept, ours = os.dup(2), sys.stderr
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        # What Python itself says meanwhile, in another thread, is no noise: the demo starts its broker beside this.
        sys.stderr = open(kept, "w", buffering=1, closefd=False)  # noqa: SIM115 - a descriptor, and it stays
        try:
            yield
        except Exception:  # not Ctrl-C: nobody asks then what TensorFlow had to say
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            # The copy stays open: somebody may be writing to it right now.
            os.dup2(kept, 2)
            sys.stderr = ours


@contextmanager
def _without_keras() -> Iterator[None]:
    """Spare what nothing here uses: TensorFlow's import ends with Keras's, and that one with all it finds to plot with.

    Asked for the older Keras, which is another package and hardly ever there, it does without; `import keras` is as
    ever. Nor is there garbage to look for among the modules. Together: 4.4 s instead of 7.7 on two cores.
    """
    name, collecting = "TF_USE_LEGACY_KERAS", gc.isenabled()
    before = os.environ.get(name)
    os.environ[name] = "1"
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _keep_compiled() -> None:
    """Have XLA keep what it compiles, so that the next start reads it: a third of the time.

    The user's cache directory; one for each TensorFlow and processor, for what is kept is machine code. Where it
    cannot be written, or TF_XLA_FLAGS says otherwise, nothing is kept.
    """
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if _CACHE_FLAG in flags:
        return
    try:
        processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5] == "flags"), "")
        made_for = f"{metadata.version('tensorflow')} {platform.machine()} {processor}"
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = caches / "forecaster" / "xla" / hashlib.sha256(made_for.encode()).hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    os.environ["TF_XLA_FLAGS"] = f"{flags} {_CACHE_FLAG}={directory}".strip()


_need_scratch_space()
_keep_compiled()
# 3 = fatal only: what TensorFlow has to say about missing CUDA libraries is no news on a machine without a GPU.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _quiet_stderr(), _without_keras():
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

tf.get_logger().setLevel("ERROR")

# TensorFlow ships no types; to mypy a tensor is Any, and the docstrings give the shapes.
Tensor: TypeAlias = Any
# A network's weights by name, and a batch of streams' fields by name, [batch, ...] each (layout.py names both).
Weights: TypeAlias = dict[str, Tensor]
Fields: TypeAlias = dict[str, Tensor]

__all__ = ["DeviceChoice", "Fields", "Tensor", "Weights", "pick_device", "tf", "xla"]


def pick_device(choice: DeviceChoice) -> str:
    """Return the name of the device to run on, `/GPU:0` or `/CPU:0`, GPU memory growing as needed.

    Raises:
        Fatal: `gpu` was asked for and there is none.
    """
    gpus = [] if choice == "cpu" else tf.config.list_physical_devices("GPU")
    if choice == "gpu" and not gpus:
        raise Fatal('device = "gpu": TensorFlow sees no GPU here; install tensorflow[and-cuda], or set device = "auto"')
    for gpu in gpus:
        # Refused once the GPU is in use; then it was set by whoever used it first.
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)  # noqa: FBT003 - TensorFlow's signature
    return "/GPU:0" if gpus else "/CPU:0"
