"""The agent's decisions: slots, queue, launchers, deadlines, the account of core-seconds. Pure: no I/O, no clock."""
