"""`herder bench`: the built-in benchmarks. A module each, which says the question that it answers.

All run end to end (client, coordinator, agent, child as processes, TLS, journal) on one machine, and what depends on
the machine is measured beside Herder in the same run, so that a figure is a ratio where it can be one.
"""
