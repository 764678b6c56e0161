"""The second client: librdkafka in C, by confluent-kafka. The only place that imports it.

The same source and sink as kafka-python's, to the same contract and under the same
tests; its threads fetch, compress and send without Python's lock. Topics, groups and
the commands around the daemon stay with kafka-python: they are no part of the loop.
"""
