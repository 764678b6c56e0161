"""A short storm over real daemons; `make chaos` has the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from storm import Storm, run


# Two busy cores need five times what two idle ones do.
@pytest.mark.timeout(900)
def test_a_storm_changes_nothing_that_a_subscriber_sees(tmp_path: Path, client: str) -> None:
    """Kills, a restarted broker, a pause past the session, new weights: every record answered as in a quiet run."""
    # Fewer slots than streams: they move between the tiers all the time.
    storm = Storm(
        seed=11,
        records=6_000,
        instances=2,
        kills=3,
        terminations=0,
        pauses=1,
        broker_restarts=1,
        swaps=3,
        capacity=256,
        client=client,
    )
    report = run(storm, tmp_path)
    assert report.findings.clean, str(report)
    assert not report.counts["crashes"], str(report)
    assert report.findings.records == storm.records
    assert report.findings.dead_letters > 0
    assert all(report.counts[f"forecasts of v{number:02}"] for number in (0, storm.swaps)), str(report)
