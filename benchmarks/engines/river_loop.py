"""A loop by hand around River: an average for each key, exactly once, the states pickled into a topic."""

from __future__ import annotations

import json
import pickle
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition
from river import stats

ALPHA = 0.1
bootstrap, source, sink, states, interval_s = sys.argv[1:]

consumer = Consumer(
    {
        "bootstrap.servers": bootstrap,
        "group.id": sink,
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
    }
)
producer = Producer({"bootstrap.servers": bootstrap, "transactional.id": sink, "linger.ms": 5})
producer.init_transactions(30)
consumer.subscribe([source])
means: dict[bytes, stats.EWMean] = {}
while True:
    producer.begin_transaction()
    end_s = time.monotonic() + float(interval_s)
    offsets: dict[tuple[str, int], int] = {}
    touched: dict[bytes, int] = {}
    while time.monotonic() < end_s:
        for message in consumer.consume(500, 0.01):
            key, value = message.key(), json.loads(message.value())
            mean = means.setdefault(key, stats.EWMean(fading_factor=ALPHA))
            mean.update(value["value"])
            answer = json.dumps({"time": value["time"], "mean": mean.get()})
            producer.produce(sink, answer, key, message.partition())
            touched[key] = message.partition()
            offsets[message.topic(), message.partition()] = message.offset() + 1
        producer.poll(0)
    for key, partition in touched.items():
        producer.produce(states, pickle.dumps(means[key]), key, partition)
    told = [TopicPartition(*at, offset) for at, offset in offsets.items()]
    producer.send_offsets_to_transaction(told, consumer.consumer_group_metadata())
    producer.commit_transaction()
