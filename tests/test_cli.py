"""The commands as a person or a script meets them: what they print, what they exit with, what they load."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from forecaster.cli import main
from forecaster.commands import train
from forecaster.config import load_config
from forecaster.model import registry
from forecaster.model.training import TrainingReport, TrainOptions
from forecaster.networks import network_spec

ROOT = Path(__file__).parent.parent
CONFIG = """
[[inputs]]
name = "ticks"
topics = ["ticks"]
stream = "symbol"
time = { field = "time" }
targets = ["price"]
horizons = [1, 4]
network = { units = 4 }
model = "MODELS"

[kafka]
bootstrap_servers = "127.0.0.1:1"  # nobody is there
poll_records_max = 16
[streams]
capacity = 16
[training]
window = 16
batch_streams = 4
steps_max = 60
"""


def write_config(directory: Path, own: str = "") -> str:
    """With its models beside it; `own`: another line for the input."""
    path = directory / "config.toml"
    path.write_text(CONFIG.replace("MODELS", str(directory / "models")).replace("targets =", f"{own}\ntargets ="))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config whose model directory is empty."""
    return write_config(tmp_path)


@pytest.fixture
def untrained(config: str) -> str:
    """The same, and no model named."""
    path = Path(config)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("model")))
    return config


def rows(count: int) -> Iterator[str]:
    """Two streams of a season, a little noise, and one bad row."""
    noise = random.Random(5)
    yield "time,symbol,price"
    for i in range(count):
        for phase, symbol in enumerate(("A", "B")):
            price = 100 + 10 * math.sin(i / 2 + phase) + noise.gauss(0, 0.1)
            yield f"2026-01-{1 + i // 24:02d}T{i % 24:02d}:00:00Z,{symbol},{price if i != 9 else 'broken'}"


def write_history(directory: Path) -> str:
    """Ten days by the hour."""
    path = directory / "ticks.csv"
    path.write_text("\n".join(rows(240)) + "\n")
    return str(path)


@pytest.fixture
def history(tmp_path: Path) -> str:
    """A CSV file of some days."""
    return write_history(tmp_path)


def forecaster(*words: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "forecaster", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["check", "--config", "config.toml"],
        ["topics", "create"],
        ["models", "list"],
    ],
)
def test_tensorflow_is_not_loaded(words: list[str]) -> None:
    """`--help`, `--version`, `check` and `topics` never import TensorFlow, nor keras."""
    code = (
        "import sys; from forecaster.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name.partition('.')[0] in ('tensorflow', 'keras') for name in sys.modules))"
    )
    nobody = {"FORECASTER__KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nobody, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_argparse_and_little_else() -> None:
    """`--help` loads no third-party package at all."""
    code = (
        "import sys; before = set(sys.modules); from forecaster.cli import _parser; _parser([])\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "sys.exit(str(new) if new != {'forecaster'} else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- one line for what is wrong


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["check", "--set", "streams.capacity=0"], 2, "{config}: [streams] capacity: expected an integer >= 1, got 0"),
        (["run", "--set", "kafka.nonsense=1"], 2, "{config}: [kafka] nonsense: no such setting"),
        (["run", "--set", "nonsense"], 2, "--set nonsense: expected section.key=value"),
        (["train"], 2, "train: expected either files or --from-kafka"),
        (["train", "{history}", "--from-kafka"], 2, "train: expected either files or --from-kafka"),
        (["train", "{history}", "--from", "3"], 2, "train: --from and --to go with --from-kafka"),
        (["train", "{history}", "--input", "tocks"], 2, "--input: expected one of ticks, got tocks"),
        (["train", "none.csv"], 1, "none.csv: no such file"),
        (["replay", "none.csv"], 1, "none.csv: no such file"),
        (["replay", "ticks.xlsx"], 1, "ticks.xlsx: expected a file that ends in "),
        (["replay", "{history}", "--set", "kafka.group_id=''"], 2, "{config}: [kafka] group_id: "),
        (["replay", "{history}"], 1, "{models}: no model here yet; train one first (forecaster train)"),
        (["topics", "create"], 1, "no broker answers at 127.0.0.1:1"),
        (["train", "--from-kafka"], 1, "no broker answers at 127.0.0.1:1"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    config: str, history: str, capfd: pytest.CaptureFixture[str], words: list[str], code: int, line: str
) -> None:
    """Each mistake has its line on standard error, nothing on standard output: 2 for the user's words, else 1."""
    places = {"config": config, "history": history, "models": str(Path(config).parent / "models")}
    assert main([*(word.format(**places) for word in words), "--config", config]) == code
    said = capfd.readouterr()
    assert said.err.startswith(f"forecaster: {line.format(**places)}")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_missing_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """No config file is a matter of usage."""
    assert main(["check", "--config", "/nowhere/config.toml"]) == 2
    assert capsys.readouterr().err == "forecaster: /nowhere/config.toml: No such file or directory\n"


@pytest.mark.parametrize("words", [[], ["dance"], ["topics"], ["topics", "create", "--partitions", "0"], ["replay"]])
def test_usage_is_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What argparse refuses names the command and exit with 2."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: forecaster")


def test_training_needs_a_place_for_the_weights(
    untrained: str, history: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input without `model` cannot be trained, and is told so before anything is read."""
    assert main(["train", history, "--config", untrained]) == 2
    assert capsys.readouterr().err.startswith("forecaster: [[inputs]] ticks model: is missing: the directory for")


# ---------------------------------------------------------------------- check


def test_the_example_config_is_valid() -> None:
    """config.toml at the top has two inputs and nothing that is refused."""
    assert [each.name for each in load_config(ROOT / "config.toml", environment={}).inputs] == ["ticks", "sensors"]


def test_check_has_a_line_for_each_thing(untrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A good config is a line each for the file, the server and every input's model, and exit 0."""
    assert main(["check", "--config", untrained]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok    {untrained}: 1 input: ticks",
        "ok    [http] listen: 127.0.0.1:9108, no TLS, no login",
        "ok    [[inputs]] ticks model: none, forecasts are the last value until `forecaster train`",
    ]


def test_check_finds_a_model_that_is_not_there(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that `run` would refuse is a finding, and exit 1."""
    assert main(["check", "--config", config]) == 1
    assert "FAIL  [[inputs]] ticks model: " in capsys.readouterr().out


def test_check_as_json_is_one_document(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` says the same to a script, whatever is wrong."""
    assert main(["check", "--json", "--config", config]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [finding["ok"] for finding in document["findings"]] == [True, True, False]
    assert main(["check", "--json", "--config", config, "--set", "kafka.group_id=1"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"]
    assert document["findings"][0]["text"].startswith(f"{config}: [kafka] group_id: expected a string")


def test_check_connect_says_that_nobody_answers(untrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A broker that is away is a finding like any other."""
    assert main(["check", "--connect", "--config", untrained]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL  no broker answers at 127.0.0.1:1")


def test_check_finds_missing_certificates_and_passwords(untrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a connection would need from this machine is looked at without one."""
    settings = ['security_protocol="SASL_SSL"', 'sasl_mechanism="PLAIN"', 'sasl_username="me"', 'ssl_cafile="/no.pem"']
    flags = [word for setting in settings for word in ("--set", f"kafka.{setting}")]
    assert main(["check", "--config", untrained, *flags]) == 1
    password, authority = capsys.readouterr().out.splitlines()[-2:]
    assert password.startswith(
        "FAIL  [kafka] sasl_password is missing: set [kafka] sasl_password_file, FORECASTER__KAFKA"
    )
    assert authority == "FAIL  [kafka] ssl_cafile: /no.pem is no file"


def test_check_finds_a_client_that_is_not_installed(
    untrained: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other client is an extra: a finding says what installs it, and nothing else fails."""
    flags = ["--set", "kafka.client=librdkafka"]
    assert main(["check", "--config", untrained, *flags]) == 0
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "confluent_kafka" else there(name))
    assert main(["check", "--config", untrained, *flags]) == 1
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert found == ["FAIL  [kafka] client: librdkafka is not installed: pip install 'forecaster[librdkafka]'"]


def test_check_finds_a_server_that_is_open(untrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that other machines could ask without a login is a finding."""
    assert main(["check", "--config", untrained, "--set", "http.listen=0.0.0.0:9108"]) == 1
    assert "FAIL  [http] listen: 0.0.0.0:9108 is open to other machines" in capsys.readouterr().out


def test_check_shows_what_holds(
    untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--show` prints defaults, file, environment and flags as one config, equal when read again; secrets as ***."""
    monkeypatch.setenv("FORECASTER__KAFKA__SASL_PASSWORD", "pass-8431-word")
    monkeypatch.setenv("FORECASTER__INPUTS__TICKS__CATEGORIES", '{ "a b" = ["\u00e9", "y"] }')
    flags = ["--set", "kafka.group_id=pass-8431-word-too", "--set", "inputs.ticks.late=step"]
    assert main(["check", "--show", "--config", untrained, *flags]) == 0
    shown = capsys.readouterr().out
    assert '\n# sasl_password = "***"\n' in shown
    assert "8431" not in shown
    again = tmp_path / "again.toml"
    again.write_text(shown.replace("***-too", "pass-8431-word-too"))
    holds = load_config(untrained, flags[1::2])
    monkeypatch.delenv("FORECASTER__INPUTS__TICKS__CATEGORIES")
    assert load_config(again) == holds


def test_a_network_that_cannot_be_is_one_line(untrained: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few features for the seasons: the line names the key and what it takes."""
    flags = ["--set", "inputs.ticks.seasons=[24]", "--set", "inputs.ticks.network.memory=6"]
    assert main(["check", "--config", untrained, *flags]) != 0
    said = "".join(capsys.readouterr())
    assert "[[inputs]] ticks network.memory: expected 0, or an integer >= 7 with 1 seasons, got 6" in said


# ---------------------------------------------------------------------- train, replay


class Trained(NamedTuple):
    """What a training left behind."""

    config: str
    history: str
    document: Any

    @property
    def models(self) -> Path:
        """The directory of its versions."""
        return Path(self.config).parent / "models"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Sixty steps on some days of two streams, the season to be found in them, reported as JSON."""
    directory = tmp_path_factory.mktemp("trained")
    config, history = write_config(directory, 'seasons = "auto"'), write_history(directory)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["train", history, "--config", config, "--json"]) == 0
    return Trained(config, history, json.loads(said.getvalue()))


def test_train_saves_a_champion_with_its_report(trained: Trained) -> None:
    """`--json` is one document, and what it says of history and held-out time stands in the model too."""
    document = trained.document
    assert registry.champion(trained.models) == document["version"]
    assert document["report"]["steps"] == 60
    history = document["history"]
    assert (history["streams"], history["records"], history["refused"]) == (2, 478, {"wrong_type": 2})
    kept = registry.load(trained.models).training
    assert (kept["history"], kept["held_out"]) == (history, document["held_out"])


def test_train_finds_the_season_and_keeps_it_with_the_model(trained: Trained) -> None:
    """A sine of 4 pi records is a season of 13; whoever loads the model with the same config has it too."""
    assert trained.document["seasons"] == [13]
    model = registry.load(trained.models)
    assert model.spec.seasons == (13,)
    assert network_spec(load_config(trained.config).inputs[0]) == model.spec


def test_train_compares_with_the_last_value(trained: Trained) -> None:
    """On a season the held-out errors are below the last value's, at each horizon, over that part of the records."""
    for score, steps in zip(trained.document["held_out"], (1, 4), strict=True):
        assert (score["target"], score["steps"], score["streams"]) == ("price", steps, 2)
        assert score["error_ratio"] < 1.0
        assert score["forecasts"] == 2 * round(239 * 0.2)


def test_the_report_fits_a_screen(trained: Trained) -> None:
    """The text for people names the losses, the gradient by records back, the errors and the place."""
    document = trained.document
    report = msgspec.convert(document["report"], TrainingReport)
    lines = list(train._lines(report, TrainOptions(holdout=0.2), document, document["path"]))
    assert len(lines) < 20
    text = "\n".join(lines)
    for words in (
        "history   478 records of 2 streams, 2026-01-01T00:00:00+00:00 to 2026-01-10T23:00:00+00:00",
        "left out  2 wrong_type",
        "seasons   13 (records)",
        "loss      ",
        "gradient  norm ",
        "by records back: 1: 1  2: ",
        "held out  the last 20 % of each stream's time; error = mean absolute error / last value's",
        "price +1: error 0.",
        "price +4: error 0.",
        f"saved     {document['path']}",
    ):
        assert words in text


def test_replay_writes_what_the_daemon_would(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forecasts, signals and dead letters as JSON lines with the champion's name; the summary on standard error."""
    files = [tmp_path / name for name in ("forecasts", "signals", "dead-letters")]
    outputs = [f"{flag}={file}" for flag, file in zip(("--output", "--signals", "--dead-letters"), files, strict=True)]
    assert main(["replay", trained.history, "--config", trained.config, *outputs]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "480 records: 478 forecasts, " in said.err
    assert "2 dead letters (2 wrong_type)" in said.err
    forecasts, signals, letters = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert (len(forecasts), len(letters)) == (478, 2)
    assert {each["model"] for each in forecasts} == {f"ticks@{trained.document['version']}"}
    for stream in ("A", "B"):
        own = [each["direction"] for each in signals if each["stream"] == stream]
        assert all(before != after for before, after in itertools.pairwise(own))


def test_a_model_of_another_network_is_one_line(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that do not fit the config are refused by check, replay and run with the first difference."""
    changed = tmp_path / "config.toml"
    changed.write_text(Path(trained.config).read_text().replace("horizons = [1, 4]", "horizons = [1, 5]"))
    told = "horizons = [1,4], the config says [1,5]; train it again"
    for words in (["replay", trained.history], ["run"]):
        assert main([*words, "--config", str(changed)]) == 1
        line = capsys.readouterr().err
        assert line.startswith("forecaster: [[inputs]] ticks model ")
        assert told in line
    assert main(["check", "--config", str(changed)]) == 1
    assert told in capsys.readouterr().out


def test_nothing_to_train_on_says_why(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file of bad rows only is one line with the reasons."""
    path = tmp_path / "bad.csv"
    path.write_text("time,symbol,price\nx,A,1\n2026-01-01,A,y\n2026-01-01,A,y\n")
    assert main(["train", str(path), "--config", config]) == 1
    assert capfd.readouterr().err == "forecaster: nothing to train on: 2 wrong_type, 1 bad_time\n"


def test_an_output_that_cannot_be_written_is_one_line(
    untrained: str, history: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A directory that is not there, a full disk."""
    assert main(["replay", history, "--config", untrained, "--output", "/nowhere/f"]) == 1
    assert capfd.readouterr().err == "forecaster: /nowhere/f: cannot be written: No such file or directory\n"
    if Path("/dev/full").exists():
        assert main(["replay", history, "--config", untrained, "--output", "/dev/full"]) == 1
        assert capfd.readouterr().err == "forecaster: /dev/full: cannot be written: No space left on device\n"


def test_a_reader_that_has_enough_ends_the_replay_quietly(untrained: str, history: str) -> None:
    """`| head -1`: exit 141 as the shell expects of a broken pipe, and not a word."""
    with forecaster("replay", history, "--config", untrained) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


def test_ctrl_c_in_training_is_quiet(config: str, history: str, tmp_path: Path) -> None:
    """SIGINT ends training with 130, no traceback, and no version half written."""
    flags = ["--set", "training.steps_max=1000000", "--set", "training.patience=1000000"]
    with forecaster("train", history, "--config", config, *flags) as process:
        assert process.stderr is not None
        # As far as training: the step is compiled once TensorFlow is in the process.
        deadline_s = time.monotonic() + 60
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtensorflow" not in maps.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        time.sleep(3.0)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(30) == 130
    assert not (tmp_path / "models").exists()


# ---------------------------------------------------------------------- run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_waits_for_its_broker_and_leaves_when_told(untrained: str, number: signal.Signals) -> None:
    """With no broker the daemon says so and waits; a signal ends it with 0 within the drain's limit."""
    words = ["run", "--config", untrained, "--set", "http.listen=127.0.0.1:0"]
    with forecaster(*words) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "no broker yet" in line:
                break
        process.send_signal(number)
        assert process.wait(15) == 0
