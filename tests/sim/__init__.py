"""The simulator: the real core and the real records in a world of virtual time, failing networks and dying programs.

One seed is one history, for ever: `run.simulate(seed)`. What must hold of every history is in `history.py`; which
faults a seed has, and how often, is drawn from it (`run.Faults`), as some bugs show only where others stay away.
"""
