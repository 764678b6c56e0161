"""The learner's process: it follows the live records, trains between duels, and changes the champion where one is won.

Champion and rival are two compiled steps over two tables of states, and both step every record that comes. A rival
begins with the champion's states, or, where its network has other sizes, with those that the newest records make: as
it would in the daemon. After a change the old champion is the next rival, with the states that it went on with: should
it win, it is put back.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.config import Config, InputConfig
from forecaster.errors import Fatal, ModelMismatch
from forecaster.labels import Swap
from forecaster.learner import wire
from forecaster.learner.duel import Duel, losses
from forecaster.learner.pipes import Incoming, Outgoing
from forecaster.learner.recent import Batch, Recent
from forecaster.model import registry
from forecaster.model.columns import StreamHistory
from forecaster.model.registry import Model
from forecaster.networks import model_directory, network_spec

if TYPE_CHECKING:
    from forecaster.model.spec import NetworkSpec
    from forecaster.model.step import StepEngine
    from forecaster.model.tuning import Tuner

LOCK_FILE = ".learner.lock"
STANDBY_S = 5.0
IDLE_S = 0.2
# Gradient steps between two looks at what has come: the records of so long wait meanwhile.
SLICE_S = 0.2


class Rival(NamedTuple):
    """Who challenges the champion: weights trained here, a version found in the directory, the champion before it."""

    kind: Literal["trained", "found", "former"]
    duel: Duel


def main() -> int:
    """Until standard input ends."""
    # Ctrl-C goes to all processes of a terminal: the daemon drains, and then this pipe ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints is no message.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    pipe = sys.stdin.buffer
    first = wire.read_frame(pipe)
    if first is None:
        return 0
    outgoing = Outgoing(out)
    try:
        learn(wire.decode_task(first), pipe, outgoing)
    except Fatal as error:
        outgoing.tell(wire.Said(str(error), level="error"))
        return error.exit_code
    return 0


def learn(task: wire.Task, pipe: BinaryIO, outgoing: Outgoing) -> None:
    """Follow, train and judge, until the daemon is gone."""
    config, input_config = task.config, task.config.input(task.input_name)
    os.nice(config.learning.nice)
    directory = model_directory(input_config)
    incoming = Incoming(pipe, len(input_config.targets), network_spec(input_config).feature_width)
    try:
        lock = (directory / LOCK_FILE).open("a")
    except OSError as error:
        raise Fatal(f"{directory}: the learner cannot write here: {error.strerror}") from None
    with lock:
        _wait_for(lock.fileno(), directory, incoming, outgoing)
        Learner(config, input_config, directory, incoming, outgoing).run()


def _wait_for(lock: int, directory: Path, incoming: Incoming, outgoing: Outgoing) -> None:
    """One learner for a directory: those of other instances stand by."""
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                outgoing.tell(wire.Said(f"another instance learns for {directory}: standing by"))
            said = True
            incoming.take(0.0)
            incoming.take_dropped()
            time.sleep(STANDBY_S)
        else:
            return


class Learner:
    """One input's."""

    def __init__(
        self, config: Config, input_config: InputConfig, directory: Path, incoming: Incoming, outgoing: Outgoing
    ) -> None:
        from forecaster.model.step import StepEngine  # noqa: PLC0415 - TensorFlow: a standby does without
        from forecaster.model.training import TrainOptions  # noqa: PLC0415
        from forecaster.shelf import load_model  # noqa: PLC0415

        self._config, self._input, self._directory = config.learning, input_config, directory
        self._incoming, self._outgoing = incoming, outgoing
        self._load = load_model
        self._refresh_s = config.models.refresh_s
        model = load_model(input_config)
        spec, streams = model.spec, self._config.streams_max
        self._options = TrainOptions(
            learning_rate=self._config.learning_rate,
            window=config.training.window,
            batch=config.training.batch_streams,
            clip_norm=config.training.clip_norm,
            seed=config.training.seed,
        )
        self._tuner = self._tuner_of(spec)
        self._recent = Recent(streams, self._config.buffer_records)
        # Not on the GPU, where the daemon's steps are.
        self._champion, self._challenger = (StepEngine(model, streams, "cpu") for _ in range(2))
        self._champion.compile()
        self._challenger.compile()
        self._settling = np.zeros(streams, np.int64)  # records of each stream since the duel began
        self._horizon = spec.steps[-1]
        self._rival: Rival | None = None
        self._found: deque[str] = deque()
        self._known = _settled(directory)
        self._complaint = ""
        self._looked_s = time.monotonic()
        self._since_round = 0
        self._steps_left = 0
        self._trained_on: dict[str, Any] = {}
        self._say(f"following {input_config.name}, champion {model.version}")

    def run(self) -> None:
        """For ever."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Step what has come, and then some of what there is to do: judge, or train."""
        for batch in self._incoming.take(0.0 if self._steps_left and not self._rival else IDLE_S):
            self._follow(batch)
        if dropped := self._incoming.take_dropped():
            self._outgoing.tell(wire.Dropped(dropped))
        if time.monotonic() - self._looked_s >= self._refresh_s:
            self._looked_s = time.monotonic()
            self._look()
        if self._rival is not None:
            self._judge(self._rival)
        elif self._found:
            self._challenge_with(self._found.popleft())
        elif self._steps_left:
            self._train()
        elif self._since_round >= self._config.round_records:
            self._begin_round()

    # ------------------------------------------------------------------ following

    def _follow(self, batch: Batch) -> None:
        """Both step every record; what both have forecast is compared."""
        inputs = self._recent.add(batch)
        self._since_round += len(batch.slots)
        scores = self._champion.step(inputs).scores
        if self._rival is None:
            return
        champion = losses(scores, scores.scale)
        rival = losses(self._challenger.step(inputs).scores, scores.scale)
        # What falls due first was forecast before the duel, by the champion on both sides.
        own = self._settling[batch.slots] >= self._horizon
        np.add.at(self._settling, batch.slots, 1)
        self._rival.duel.add(champion[own], rival[own])

    def _look(self) -> None:
        """The directory is others' too: somebody may have promoted a version, or left one."""
        try:
            champion = registry.champion(self._directory)
            if champion is not None and champion != self._champion.model.version:
                before, model = self._champion, self._load(self._input, champion)
                self._champion = self._stepping(before, model)
                self._give_states(self._champion, before)
                self._rival = None
                self._steps_left = 0
                self._say(f"{champion} was promoted: following it")
        except Fatal as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._say(self._complaint)
            return
        for version in registry.versions(self._directory):
            if version not in self._known:
                self._known.add(version)
                if version != self._champion.model.version:
                    self._found.append(version)

    # ------------------------------------------------------------------ training

    def _tuner_of(self, spec: NetworkSpec) -> Tuner:
        from forecaster.model.tuning import Tuner  # noqa: PLC0415 - TensorFlow

        return Tuner(spec, self._options, self._config.buffer_records)

    def _begin_round(self) -> None:
        histories = [history for history in self._recent.histories() if len(history.time_s) > 1]
        self._since_round = 0
        if histories:
            if self._tuner.spec != self._champion.model.spec:
                self._tuner = self._tuner_of(self._champion.model.spec)
            self._tuner.begin(histories, self._champion.model.weights)
            self._trained_on = _describe(histories)
            self._steps_left = self._config.round_steps

    def _train(self) -> None:
        """Some gradient steps; after the last one, a challenger."""
        until_s = time.monotonic() + SLICE_S
        steps = clipped = 0
        loss = norm = 0.0
        while self._steps_left and time.monotonic() < until_s:
            self._steps_left -= 1
            made = self._tuner.step()
            if made is not None:
                steps, clipped, loss, norm = steps + 1, clipped + made.clipped, made.loss, made.norm
        if steps:
            self._outgoing.tell(wire.Trained(steps, clipped, loss, norm))
        if self._steps_left:
            return
        weights = self._tuner.weights()
        try:
            registry.refuse_not_finite(weights)
        except Fatal as error:
            self._say(str(error))
            return
        parent = self._champion.model
        training = {"history": self._trained_on, "options": msgspec.to_builtins(self._options)}
        version = registry.new_version()
        self._begin_duel(
            "trained",
            Model(spec=parent.spec, weights=weights, version=version, parent=parent.version, training=training),
        )

    # ------------------------------------------------------------------ duels

    def _challenge_with(self, version: str) -> None:
        if version == self._champion.model.version:
            return  # somebody has promoted it meanwhile
        try:
            self._begin_duel("found", self._load(self._input, version))
        except Fatal as error:
            self._say(str(error))

    def _begin_duel(self, kind: Literal["trained", "found"], model: Model) -> None:
        self._challenger = self._stepping(self._challenger, model)
        self._give_states(self._challenger, self._champion)
        self._rival = self._against_champion(kind)

    def _stepping(self, engine: StepEngine, model: Model) -> StepEngine:
        """A compiled step with these weights: this one, unless they are of another network."""
        if engine.model.spec == model.spec:
            engine.swap(model)
            return engine
        self._say(f"{model.version} has other sizes: compiling it")
        made = engine.for_model(model)
        made.compile()
        return made

    def _give_states(self, engine: StepEngine, other: StepEngine) -> None:
        """The other's; or, where they do not fit, what the newest records make of none."""
        slots = np.arange(self._config.streams_max, dtype=np.int32)
        if engine.model.spec == other.model.spec:
            engine.write(slots, other.read(slots))
            return
        engine.write(slots, np.tile(engine.layout.initial_row(), (len(slots), 1)))
        for inputs in self._recent.replayed():
            engine.step(inputs)

    def _against_champion(self, kind: Literal["trained", "found", "former"]) -> Rival:
        self._settling[:] = 0
        duel = Duel(self._champion.model.version, self._config.duel_records, self._config.margin)
        return Rival(kind, duel)

    def _judge(self, rival: Rival) -> None:
        duel, version = rival.duel, self._challenger.model.version
        if duel.verdict == "open":
            return
        self._rival = None
        text = f"loss {duel.ratio:.3f} of {duel.against}'s over {duel.records:,} records"
        if duel.verdict == "lost":
            if rival.kind != "former":
                self._outgoing.tell(wire.Judged(Swap.REJECTED, version, text))
            return
        if registry.champion(self._directory) != self._champion.model.version:
            return  # somebody was quicker: the next look says so
        self._put_in_use(rival, text)
        self._champion, self._challenger = self._challenger, self._champion
        self._since_round = self._steps_left = 0
        # The old champion goes on beside the new one, and comes back if it is better after all.
        self._rival = None if rival.kind == "former" else self._against_champion("former")

    def _put_in_use(self, rival: Rival, text: str) -> None:
        model = self._challenger.model
        outcome = Swap.ROLLED_BACK if rival.kind == "former" else Swap.PROMOTED
        why = f"{'rolled back' if rival.kind == 'former' else 'learner'}: {text}"
        if rival.kind == "trained":
            champion_loss, loss = rival.duel.losses
            told = {"against": rival.duel.against, "records": rival.duel.records, "ratio": rival.duel.ratio}
            told |= {"loss": loss, "champion_loss": champion_loss}
            model = msgspec.structs.replace(model, training=model.training | {"duel": told})
            self._known.add(model.version)
            registry.save(self._directory, model, why=why)
        else:
            registry.set_champion(self._directory, model.version, why)
        self._outgoing.tell(wire.Judged(outcome, model.version, text))

    def _say(self, text: str) -> None:
        self._outgoing.tell(wire.Said(text))


def _settled(directory: Path) -> set[str]:
    """The versions that are nobody's challengers: once in use, or older than the last change of the champion."""
    promotions = registry.promotions(directory)
    settled = {promotion.version for promotion in promotions}
    for version in registry.versions(directory):
        try:
            created = registry.describe(directory, version).created
        except ModelMismatch:
            created = ""
        if not created or (promotions and created < promotions[-1].when):
            settled.add(version)
    return settled


def _describe(histories: list[StreamHistory]) -> dict[str, Any]:
    """As `forecaster train` keeps it."""
    times: list[NDArray[np.float64]] = [history.time_s for history in histories]
    return {
        "streams": len(times),
        "records": sum(map(len, times)),
        "from": _iso(min(float(each[0]) for each in times)),
        "to": _iso(max(float(each[-1]) for each in times)),
    }


def _iso(time_s: float) -> str:
    return str(np.datetime64(round(time_s), "s")) + "+00:00"
