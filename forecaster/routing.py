"""Which input a topic belongs to, and which topics an input's pipeline reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from forecaster.config import InputConfig, KafkaConfig
from forecaster.errors import InvalidConfig


class Routes:
    """Topic -> input: by name, else by the one pattern that matches it whole.

    An input with `repartition` has two topics for each of its own: the one that
    others write, and the internal one that its pipeline reads.
    """

    def __init__(self, inputs: Sequence[InputConfig], kafka: KafkaConfig) -> None:
        self._names: dict[str, str] = {}
        self._foreign: set[str] = set()  # topics of inputs with `repartition`, as others write them
        for each in inputs:
            for topic in each.topics:
                self._names[topic] = each.name
                if each.repartition:
                    self._foreign.add(topic)
                    self._names[kafka.internal_topic(topic)] = each.name
        self._topics = tuple(self._names)
        self._patterns = [(re.compile(each.pattern), each.name) for each in inputs if each.pattern is not None]

    @property
    def subscription(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The topics and the patterns to subscribe to."""
        return self._topics, tuple(pattern.pattern for pattern, _ in self._patterns)

    def is_rekeyed(self, topic: str) -> bool:
        """Do this topic's records go to the internal topic first?"""
        return topic in self._foreign

    def input_of(self, topic: str) -> str:
        """The name of the topic's input. Raises InvalidConfig where patterns disagree or none matches."""
        if topic not in self._names:
            names = [name for pattern, name in self._patterns if pattern.fullmatch(topic)]
            if len(names) != 1:
                msg = f"[[inputs]] pattern: {topic} matches {', '.join(names) or 'no input'}: expected exactly one"
                raise InvalidConfig(msg)
            self._names[topic] = names[0]
        return self._names[topic]
