"""The simulator: the shipped programs in a world of virtual time, failing networks and disks, and dying processes.

One seed is one history, for ever: `run.simulate(seed)`.

======================  ===============================================================================================
shipped                 the coordinator's core, loop (group commit, what waits for the disk), links, transfers, blob
                        account, replay and snapshot; the agent's core, connection and relays; the client's connection
                        with its outbox, tracks and fetches; acceptor, sessions, heartbeats, frames, codecs
simulated               clocks and event loops (`world`), TCP (`network`), disks (`journal`, `coordinator`), processes
                        of tasks and templates (`agent`), users (`client`)
left out                TLS, HTTP, metrics; the wait between two dials (`network.SimDialler`); the agent's loop, whose
                        part of carrying effects to processes `agent.Life` takes
======================  ===============================================================================================

Which faults a history has, and how often, is drawn from its seed (`run.Faults`): messages are lost with their
connection, late, doubled, overtaken by those of a newer connection; hosts are cut off one way or both; every program is
killed or stopped; syncs are slow, fail, find no room, or are torn by a crash; blobs are lost; tasks raise, die, hang,
grow, overrun, wait, run until they are cancelled; there are graphs, arrays, cancellations, drains, revoked agents, jobs
that are paused, changed, or run again, and clients that leave, die, or find detached jobs again. Some histories have a
theme (`run.THEMES`, decision 29): much of what it takes to show one kind of bug, and little else. What must hold of
every history is in `history`; the bugs that were planted to see that it would be found, in `planted`.
"""
