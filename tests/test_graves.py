"""Dropped streams and replays: what the state topic says of them, and what a restart makes of it."""

from __future__ import annotations

from daemon import Daemon, answers, feed, make_config, make_log, tick

from forecaster.graves import Graves
from forecaster.messages import decode_state, is_grave
from forecaster.records import TopicPartition
from forecaster.streams import StreamKey

PARTITION = TopicPartition("ticks", 0)
A, B = StreamKey(PARTITION, "A"), StreamKey(PARTITION, "B")


def never(_: StreamKey) -> bool:
    """It has not come back."""
    return False


def always(_: StreamKey) -> bool:
    """It has come back."""
    return True


def test_a_dropped_stream_has_a_grave_until_no_replay_comes_to_it() -> None:
    """First "dropped after 7", and a tombstone once a restart begins later than that; each once."""
    graves = Graves()
    graves.dig(A, 7)
    assert graves.untold
    assert graves.settle({PARTITION: 5}, never) == [(A, 7)]
    assert graves.settle({PARTITION: 7}, never) == []
    assert graves.settle({PARTITION: 8}, never) == [(A, None)]
    assert graves.settle({PARTITION: 9}, never) == []


def test_no_replay_comes_to_it_any_more() -> None:
    """Dropped where a restart would begin later anyway: a tombstone at once."""
    graves = Graves()
    graves.dig(A, 7)
    assert graves.settle({PARTITION: 8}, never) == [(A, None)]


def test_a_stream_that_came_back_keeps_its_row() -> None:
    """No tombstone over the new row; but the grave itself is written, or the old row would be its past."""
    graves = Graves()
    graves.dig(A, 7)
    assert graves.settle({PARTITION: 5}, always) == [(A, 7)]
    assert graves.settle({PARTITION: 8}, always) == []


def test_dropped_twice_counts_the_second_time() -> None:
    """The later grave holds more, and only its own end makes a tombstone."""
    graves = Graves()
    graves.dig(A, 7)
    graves.settle({PARTITION: 5}, never)
    graves.dig(A, 20)
    assert graves.settle({PARTITION: 10}, never) == [(A, 20)]
    assert graves.holds(A, 20)
    assert not graves.holds(A, 21)
    assert not graves.holds(B, 0)
    assert graves.settle({PARTITION: 21}, never) == [(A, None)]


def test_a_partition_that_goes_takes_its_graves_along() -> None:
    """Another instance writes them now."""
    graves = Graves()
    graves.dig(A, 7)
    graves.drop(PARTITION)
    assert not graves.untold
    assert graves.settle({PARTITION: 8}, never) == []


def test_a_replay_does_not_begin_a_dropped_stream_in_its_middle() -> None:
    """Dropped, come back, killed before a row was written: the restart goes on with the stream that came back."""
    log = make_log()
    small = make_config(streams={"capacity": 4, "streams_max": 4, "flush_interval_s": 1_000.0})
    # B waits for its row from the first record on, so that the replay begins there. D takes A's slot, A takes E's.
    feed(log, [tick(symbol, minute, 100.0 + minute) for minute, symbol in enumerate("BACEBCDEBCDA")])
    Daemon(log, small, poll=4).settle()
    rows = {record.key: decode_state(record.value or b"") for record in log.all("ticks.state")}
    assert {key for key, row in rows.items() if is_grave(row)} == {b"A", b"E"}
    assert log.offsets[PARTITION].replay_offset == 0
    feed(log, [tick("A", 12, 112.0), tick("B", 13, 113.0)])
    # Room for all of them: nothing is dropped again by itself.
    Daemon(log, make_config(), which=2).settle()
    forecasts = [answers(log).forecasts["ticks", 0, offset] for offset in (11, 12, 13)]
    assert [(each["stream"], each["sequence"]) for each in forecasts] == [("A", 1), ("A", 2), ("B", 4)]
