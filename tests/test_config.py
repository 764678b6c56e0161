"""What the config takes, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forecaster.config import SECRETS, Config, InputConfig, KafkaConfig, build_config, load_config
from forecaster.errors import InvalidConfig
from forecaster.reference import reference

MINIMAL = """
[[inputs]]
name = "ticks"
topics = ["ticks"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A config file with one input and nothing else."""
    file = tmp_path / "config.toml"
    file.write_text(MINIMAL)
    return file


def tree(**sections: Any) -> dict[str, Any]:
    """A tree of settings with one input, `ticks`; keys of `input` go over it."""
    each = {"name": "ticks", "topics": ["ticks"], **sections.pop("input", {})}
    return {"inputs": [each], **sections}


def complaint(settings: dict[str, Any]) -> str:
    """What the config says against these settings."""
    with pytest.raises(InvalidConfig) as refused:
        build_config(settings, "config.toml")
    return str(refused.value)


def test_one_input_is_enough(path: Path) -> None:
    """A name and a topic are all that has to be said: everything else has a default."""
    config = load_config(path, environment={})
    assert config.inputs[0].topics == ("ticks",)
    assert config.kafka.processing_guarantee == "exactly-once"
    assert config.kafka.delivery_timeout_s > config.kafka.transaction_timeout_s
    assert config.streams.capacity >= config.kafka.poll_records_max
    assert 0.5 in config.inputs[0].quantiles


def test_defaults_are_their_own_valid_config() -> None:
    """The defaults pass the checks that a file has to pass."""
    assert build_config(tree(), "defaults") == Config(inputs=(InputConfig(name="ticks", topics=("ticks",)),))


PLACES = [
    ({"streams": {"capacity": 0}}, "[streams] capacity: expected an integer >= 1, got 0"),
    ({"streams": {"capacity": "many"}}, "[streams] capacity: expected an integer, got a string"),
    ({"streams": {"capacities": 1}}, "[streams] capacities: no such setting"),
    ({"kafca": {}}, "[kafca]: no such setting"),
    ({"streams": 3}, "[streams]: expected a section, got an integer"),
    ({"kafka": {"processing_guarantee": "twice"}}, "[kafka] processing_guarantee: not one of the choices: 'twice'"),
    ({"kafka": {"poll_timeout_s": 0}}, "[kafka] poll_timeout_s: expected a number > 0.0, got 0"),
    (
        {"http": {"listen": "nowhere"}},
        "[http] listen: expected a string matching regex '^.+:\\\\d{1,5}$', got 'nowhere'",
    ),
    ({"input": {"topics": ["a b"]}}, "[[inputs]] ticks topics[0]: expected a string matching regex"),
    ({"input": {"topics": []}}, "[[inputs]] ticks topics: expected either topics or a pattern"),
    ({"input": {"pattern": "t.*"}}, "[[inputs]] ticks topics: expected either topics or a pattern"),
    ({"input": {"topics": [], "pattern": "("}}, "[[inputs]] ticks pattern: not a regular expression"),
    ({"input": {"targets": []}}, "[[inputs]] ticks targets: expected a list of length >= 1, got []"),
    ({"input": {"horizons": [5, 1]}}, "[[inputs]] ticks horizons: expected ascending and distinct, got [5, 1]"),
    ({"input": {"horizons": [0]}}, "[[inputs]] ticks horizons[0]: expected an integer >= 1, got 0"),
    ({"input": {"quantiles": [0.1, 0.9]}}, "[[inputs]] ticks quantiles: expected ascending, distinct and with 0.5"),
    ({"input": {"quantiles": [0.5, 1.0]}}, "[[inputs]] ticks quantiles[1]: expected a number < 1.0, got 1.0"),
    ({"input": {"time": {"unit": "weeks"}}}, "[[inputs]] ticks time.unit: not one of the choices: 'weeks'"),
    ({"input": {"signal": {"target": "volume"}}}, "[[inputs]] ticks signal.target: expected one of value, got volume"),
    ({"input": {"signal": {"horizon": 7}}}, "[[inputs]] ticks signal.horizon: expected one of [1], got 7"),
    ({"input": {"signal": {"threshold": 0.4}}}, "[[inputs]] ticks signal.threshold: expected a number >= 0.5, got 0.4"),
    ({"input": {"network": {"cell": "gnu"}}}, "[[inputs]] ticks network.cell: not one of the choices: 'gnu'"),
    ({"input": {"network": {"memory": 0}}}, "[[inputs]] ticks network.readout: learns on the memory"),
    ({"input": {"features": ["value"]}}, "[[inputs]] ticks: each field can be one of"),
    ({"input": {"stream": "value"}}, "[[inputs]] ticks: each field can be one of"),
    ({"input": {"time": {"field": "value"}}}, "[[inputs]] ticks: each field can be one of"),
    ({"input": {"sequence": "value"}}, "[[inputs]] ticks: each field can be one of"),
    (
        {"input": {"topics": ["forecasts"]}},
        "[[inputs]] ticks topics: forecasts already belongs to the daemon's own output",
    ),
    (
        {"kafka": {"delivery_timeout_s": 30}},
        "[kafka] delivery_timeout_s: expected more than transaction_timeout_s (30), got 30",
    ),
    (
        {"kafka": {"security_protocol": "SASL_SSL"}},
        "[kafka] security_protocol: SASL_SSL needs sasl_mechanism",
    ),
    (
        {"kafka": {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512"}},
        "[kafka] sasl_username: SCRAM-SHA-512 needs one",
    ),
    (
        {"kafka": {"sasl_mechanism": "PLAIN", "sasl_username": "u"}},
        "[kafka] sasl_mechanism: has no effect with security_protocol PLAINTEXT: expected SASL_SSL",
    ),
    ({"kafka": {"ssl_cafile": "ca.pem"}}, "[kafka] ssl_cafile: has no effect with security_protocol PLAINTEXT"),
    (
        {"kafka": {"security_protocol": "SSL", "ssl_certfile": "me.pem"}},
        "[kafka] ssl_certfile: goes together with ssl_keyfile",
    ),
    (
        {"kafka": {"oauth_token_url": "https://me:secret@idp/token"}},
        "[kafka] oauth_token_url: a secret does not belong",
    ),
    ({"kafka": {"oauth_token_url": "http://idp/token"}}, "[kafka] oauth_token_url: expected https://"),
    ({"kafka": {"oauth_token_url": "https://idp/token"}}, "[kafka] oauth_client_id: oauth_token_url needs one"),
]


def test_a_poll_has_no_more_records_than_the_table_has_slots() -> None:
    """A poll may bring a record of as many streams, and each needs a slot."""
    assert build_config(tree(streams={"capacity": 10}), "test").kafka.poll_records_max == 10


@pytest.mark.parametrize(("settings", "expected"), PLACES, ids=[text.split(": expected")[0] for _, text in PLACES])
def test_complaint_names_file_and_place_in_one_line(settings: dict[str, Any], expected: str) -> None:
    """A refusal is one line: the file, the section, the key, what was expected and what stands there."""
    said = complaint(tree(**settings))
    assert said.startswith(f"config.toml: {expected}")
    assert "\n" not in said


def test_missing_name_is_said_at_its_input() -> None:
    """An input with no name is found by its position."""
    assert complaint({"inputs": [{"topics": ["a"]}]}) == "config.toml: [[inputs]] 0 name: is missing"


def test_no_inputs_is_refused() -> None:
    """A daemon with nothing to read is a mistake."""
    assert complaint({}).endswith("inputs]: is missing")
    assert "[inputs]" in complaint({"inputs": []})


def test_two_inputs_share_no_name_and_no_topic() -> None:
    """A topic belongs to one input, and a name to one too."""
    twin = {"name": "ticks", "topics": ["other"]}
    assert complaint({"inputs": [tree()["inputs"][0], twin]}) == (
        "config.toml: [[inputs]] ticks: this name is taken by another input"
    )
    thief = {"name": "thief", "topics": ["ticks"]}
    assert complaint({"inputs": [tree()["inputs"][0], thief]}) == (
        "config.toml: [[inputs]] thief topics: ticks already belongs to input ticks"
    )


def test_environment_lies_over_the_file(path: Path) -> None:
    """FORECASTER__SECTION__KEY sets a key, in its own type."""
    environment = {"FORECASTER__STREAMS__CAPACITY": "5_000", "FORECASTER__KAFKA__GROUP_ID": "night", "PATH": "/bin"}
    config = load_config(path, environment=environment)
    assert (config.streams.capacity, config.kafka.group_id) == (5_000, "night")


def test_flag_lies_over_the_environment(path: Path) -> None:
    """--set wins over the environment, which wins over the file."""
    environment = {"FORECASTER__STREAMS__CAPACITY": "5000"}
    config = load_config(path, ["streams.capacity=6000", "log.level = debug"], environment)
    assert (config.streams.capacity, config.log.level) == (6_000, "debug")


@pytest.mark.parametrize("flag", ["streams.capacity", "kafka.group_id.x=1", "streams.no=1", "inputs.name=x"])
def test_bad_flag_is_refused_in_one_line(path: Path, flag: str) -> None:
    """A flag with no value, no place, or no such place is a complaint like any other."""
    with pytest.raises(InvalidConfig) as refused:
        load_config(path, [flag], {})
    assert "\n" not in str(refused.value)


def test_bad_environment_is_named_by_its_variable(path: Path) -> None:
    """A variable that leads through a value says which one it is."""
    with pytest.raises(InvalidConfig, match=r"^FORECASTER__KAFKA__GROUP_ID__X: no such setting$"):
        load_config(path, environment={"FORECASTER__KAFKA__GROUP_ID": "a", "FORECASTER__KAFKA__GROUP_ID__X": "1"})


def test_password_in_the_file_is_refused(path: Path) -> None:
    """A secret in the file is refused before anything else, and not repeated."""
    path.write_text(MINIMAL + '[kafka]\nsasl_password = "swordfish"\n')
    with pytest.raises(InvalidConfig, match="a secret does not belong here") as refused:
        load_config(path, environment={})
    assert "swordfish" not in str(refused.value)


def test_password_in_a_flag_is_refused(path: Path) -> None:
    """A flag stands in the process list: no place for a secret."""
    with pytest.raises(InvalidConfig, match="a secret does not belong here") as refused:
        load_config(path, ["kafka.sasl_password=swordfish"], {})
    assert "swordfish" not in str(refused.value)


def test_password_comes_from_its_file(path: Path, tmp_path: Path) -> None:
    """sasl_password_file is read, without the newline that an editor left."""
    secret = tmp_path / "password"
    secret.write_text("swordfish\n")
    config = load_config(path, [f"kafka.sasl_password_file={secret}"], {})
    assert config.kafka.sasl_password == "swordfish"


def test_password_comes_from_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FORECASTER__KAFKA__SASL_PASSWORD is the secret and never a setting that `repr` shows."""
    monkeypatch.setenv("FORECASTER__KAFKA__SASL_PASSWORD", "swordfish")
    config = load_config(path)
    assert config.kafka.sasl_password == "swordfish"
    assert "swordfish" not in repr(config)


def test_unreadable_password_file_is_one_complaint(path: Path) -> None:
    """A password file that is not there is named."""
    config = load_config(path, ["kafka.sasl_password_file=/no/such/file"], {})
    with pytest.raises(InvalidConfig, match=r"sasl_password_file: cannot read /no/such/file: No such file"):
        _ = config.kafka.sasl_password


def test_missing_file_is_one_complaint(tmp_path: Path) -> None:
    """A file that is not there is said by its name."""
    with pytest.raises(InvalidConfig, match=r"none\.toml: No such file or directory$"):
        load_config(tmp_path / "none.toml", environment={})


@pytest.mark.parametrize("content", [b"[kafka", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_one_complaint(path: Path, content: bytes) -> None:
    """Broken TOML, bytes that are no text and a key given twice all say `not TOML`."""
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"config\.toml: not TOML: ") as refused:
        load_config(path, environment={})
    assert "\n" not in str(refused.value)


def test_input_is_found_by_name_or_as_the_only_one() -> None:
    """One input needs no name; of several, the name decides."""
    one = build_config(tree(), "x")
    assert one.input(None).name == one.input("ticks").name == "ticks"
    several = build_config({"inputs": [*tree()["inputs"], {"name": "b", "topics": ["b"]}]}, "x")
    assert several.input("b").name == "b"
    for name in (None, "c"):
        with pytest.raises(InvalidConfig, match=f"--input: expected one of ticks, b, got {name or 'none'}"):
            several.input(name)


def test_instance_is_the_host_and_fits_a_transactional_id() -> None:
    """The default identity survives a restart: it comes from the host's name, in Kafka's own alphabet."""
    first, second = build_config(tree(), "x").kafka, build_config(tree(), "x").kafka
    assert first.instance == second.instance
    assert first.client_id == f"forecaster-{first.instance}"


def test_signal_points_into_targets_and_horizons() -> None:
    """The signal's target and horizon are names; their positions follow."""
    names = {"targets": ["a", "b"], "horizons": [1, 5], "signal": {"target": "b", "horizon": 5}}
    each = build_config(tree(input=names), "x").inputs[0]
    assert (each.signal_target, each.signal_horizon) == (1, 1)


def test_an_input_is_set_by_its_name(path: Path) -> None:
    """The environment and flags reach into an input by its name, whatever its case."""
    environment = {"FORECASTER__INPUTS__TICKS__SIGNAL__THRESHOLD": "0.7"}
    config = load_config(path, ["inputs.ticks.late=step"], environment)
    assert (config.inputs[0].signal.threshold, config.inputs[0].late) == (0.7, "step")
    with pytest.raises(InvalidConfig, match=r"^--set inputs\.other\.late: no such setting$"):
        load_config(path, ["inputs.other.late=step"], {})


def test_reference_is_the_declarations() -> None:
    """docs/configuration.md is what they say; `python -m forecaster.reference > docs/configuration.md` mends it."""
    written = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    assert written == reference()


@pytest.mark.parametrize(("section", "key"), sorted(SECRETS))
def test_a_secret_is_no_key(path: Path, section: str, key: str) -> None:
    """A secret in the file or in a flag is refused with the ways that it has, and is not repeated."""
    with pytest.raises(InvalidConfig, match="a secret does not belong here") as refused:
        load_config(path, [f"{section}.{key}=swordfish"], {})
    assert f"set [{section}] {key}_file" in str(refused.value)
    assert "swordfish" not in str(refused.value)


def test_a_secret_comes_from_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LoadCredential=kafka.sasl_password is found; the environment goes first, and the key's file before both."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "kafka.sasl_password").write_text("systemd-8431\n")
    (tmp_path / "own").write_text("file-8431\n")
    assert KafkaConfig().sasl_password == "systemd-8431"
    monkeypatch.setenv("FORECASTER__KAFKA__SASL_PASSWORD", "environment-8431")
    assert KafkaConfig().sasl_password == "environment-8431"
    assert KafkaConfig(sasl_password_file=str(tmp_path / "own")).sasl_password == "file-8431"


@pytest.mark.parametrize(("content", "why"), [(b" \n", "is empty"), (b"\xff", "is not text")])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    """A file with nothing in it, or with no text, is one line."""
    (tmp_path / "password").write_bytes(content)
    with pytest.raises(InvalidConfig, match=rf"^\[kafka\] sasl_password_file: \S+ {why}$"):
        _ = KafkaConfig(sasl_password_file=str(tmp_path / "password")).sasl_password
