"""The agent's shell: the loop that owns the state, the coordinator's connection, processes, blobs, the machine."""
