"""Runs under the *user's* interpreter, standard library only: preload, audit, seal, fork, run one task.

`PROTOCOL.md` beside this file is the contract with the agent (`herder_agent.launch`).
"""
