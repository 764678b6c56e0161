"""Readiness names what is missing; liveness tells a wait from a hang."""

from __future__ import annotations

from forecaster.health import Health


class Clock:
    """Seconds that a test turns."""

    now_s = 0.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s


def test_a_declared_check_fails_until_it_is_heard_of() -> None:
    """A daemon is not ready by omission."""
    health = Health(["model", "restore"])
    health.ok("model")
    assert not health.ready
    assert health.checks() == {"model": None, "restore": "not yet", "loop": None}
    health.ok("restore")
    assert health.ready


def test_a_check_can_fail_again() -> None:
    """Ready is a state and not an event."""
    health = Health(["broker"])
    health.ok("broker")
    health.fail("broker", "localhost:9092 does not answer")
    assert health.checks()["broker"] == "localhost:9092 does not answer"
    assert not health.ready


def test_a_loop_that_stands_is_stalled_and_not_ready() -> None:
    """No progress for longer than the limit fails both questions, and progress mends both."""
    clock = Clock()
    health = Health(stall_s=60, clock=clock)
    clock.now_s = 60
    assert health.stalled() is None
    clock.now_s = 61
    assert health.stalled() == "no progress for 61 s"
    assert health.checks() == {"loop": "no progress for 61 s"}
    health.progress()
    assert health.stalled() is None
    assert health.ready


def test_a_declared_wait_is_alive_until_its_own_limit() -> None:
    """A compile of three minutes is no hang, one of an hour is, and the answer says what it was doing."""
    clock = Clock()
    health = Health(stall_s=60, clock=clock)
    with health.waiting("compiling 6 buckets", limit_s=300):
        assert health.doing == "compiling 6 buckets"
        clock.now_s = 299
        assert health.stalled() is None
        clock.now_s = 301
        assert health.stalled() == "no progress for 301 s, compiling 6 buckets"
    assert health.doing == "running"
    assert health.stalled() is None


def test_waits_nest() -> None:
    """After an inner wait the outer one's limit holds again."""
    clock = Clock()
    health = Health(stall_s=10, clock=clock)
    with health.waiting("restore", limit_s=1_000):
        with health.waiting("broker away", limit_s=50):
            clock.now_s = 40
        clock.now_s = 900
        assert health.stalled() is None
        assert health.doing == "restore"
