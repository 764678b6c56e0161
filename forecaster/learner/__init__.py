"""Learning the shared weights while the daemon runs, in a process of its own.

feed.py     the daemon's end: hands over what is committed, keeps the process alive, stops it
wire.py     what goes between the two
process.py  the process: steps champion and rival on the same records, trains between two duels
recent.py   the records to learn from
duel.py     which of two versions forecasts better, and when that is certain enough
"""
