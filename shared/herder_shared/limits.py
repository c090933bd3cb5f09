"""Every bound in one place, each with its unit and why this much. Times are seconds, sizes bytes."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

#: Version of the wire; a peer with another one gets `Refused`.
PROTOCOL_VERSION = 1

#: A frame before the handshake is through: a hello with a node's facts takes about 1 KiB.
FRAME_BYTES_MAX_HELLO = 16 * KIB
#: A frame afterwards. Batches are cut well below this; blobs travel in chunks.
FRAME_BYTES_MAX = 2 * MIB
#: Senders cut their batches at this many payload bytes, so that one frame never holds up a heartbeat for long.
BATCH_BYTES_MAX = 512 * KIB
#: ... and at this many tasks.
BATCH_TASKS_MAX = 2_000
#: Unauthenticated or half-open connections at a time, and how long each may take.
HANDSHAKES_MAX = 256
HANDSHAKE_TIMEOUT_S = 5.0

#: Arguments, functions and results up to this travel inside their message; above it they are blobs.
INLINE_BYTES_MAX = 64 * KIB
BLOB_CHUNK_BYTES = 256 * KIB
#: Chunks of one blob under way before the receiver says that it has them.
BLOB_CHUNKS_IN_FLIGHT = 8
#: One argument or one result. Above it: `PayloadTooLarge`.
BLOB_BYTES_MAX = 16 * GIB

#: Bytes that one connection may have waiting to be sent. A peer that lets more than this pile up is dropped.
SEND_BUFFER_BYTES_MAX = 64 * MIB
#: A client's submissions not yet acknowledged; `submit` and `array` wait (back-pressure) above it.
UNACKED_SUBMIT_BYTES_MAX = 32 * MIB

#: What the coordinator holds in memory of queued tasks, and of terminal records that nobody has acknowledged; the rest
#: of each lies in its folder.
QUEUED_BYTES_MAX = 256 * MIB
KEPT_ENDS_BYTES_MAX = 256 * MIB
#: ... and of those that were acknowledged, which are kept for logs and for whoever comes late.
RECENT_BYTES_MAX = 32 * MIB
RECENT_ENDS_MAX = 100_000

#: Attempts of one node that may wait for tasks of their own at a time, their cores given up. Each is a process; beyond
#: it a wait fails, as the node would drown in processes.
LENT_MAX = 4_096
#: What a task's own client may send in one frame: it travels inside one of its agent's.
TASK_CLIENT_FRAME_BYTES_MAX = FRAME_BYTES_MAX - 4 * KIB
#: An agent takes nothing more from its tasks' clients while so much waits on its own link.
TASK_CLIENT_BUFFER_BYTES_MAX = 8 * MIB
#: Terminal records under way to a task's own client, unacknowledged: many share their agent's link.
TASK_CLIENT_FEED_BYTES_MAX = 1 * MIB

HEARTBEAT_S = 2.0
#: The coordinator's trust in a silent agent. FAULTS.md: 30 s outlives a switch reboot and a long garbage collection.
LEASE_S = 30.0
#: After a connection that *closed* (a killed agent's does at once): how long the same incarnation may take to be back.
RECONNECT_GRACE_S = 1.0
#: After a restart of the coordinator, assigned tasks stay bound to their agents for this long, or for two leases.
RESTART_GRACE_S = 60.0
#: A vanished client's jobs that are not detached are cancelled after this.
DISCONNECT_GRACE_S = 60.0
#: ... or after what the client itself asked for, up to this: a month.
DISCONNECT_GRACE_S_MAX = 30 * 86_400.0
#: Between SIGTERM and SIGKILL of a cancelled or timed-out task.
KILL_GRACE_S = 2.0
#: Reconnection: first wait, longest wait; full jitter.
BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 5.0
#: A tick of the coordinator that comes later than this pushes every deadline by what it was late.
SELF_STALL_S = 0.5

#: Captured output of a task, per stream: the first and the last of this many bytes each are kept.
LOG_HEAD_BYTES = 32 * KIB
LOG_TAIL_BYTES = 32 * KIB
#: Traceback and message of a failed task.
ERROR_TEXT_BYTES_MAX = 64 * KIB
#: Last lines of stderr put into the message of a crash.
STDERR_TAIL_BYTES = 4 * KIB

#: Certificates of one cluster that may be revoked: about 10 MB of the coordinator's memory.
REVOKED_KEYS_MAX = 100_000

ARRAY_TASKS_MAX = 10_000_000
NAME_CHARS_MAX = 200
#: Workload labels in metrics before the rest become `other`.
WORKLOAD_LABELS_MAX = 200
#: Ended jobs that are listed.
ENDED_JOBS_MAX = 1_000
#: `/sd` lists a lost agent for this long, so that `up == 0` can be seen and alert.
SD_LOST_AGENT_S = 300.0
#: An agent's exposition is pulled at most this often.
EXPOSITION_AGE_S_MAX = 5.0

#: Failures of a template's start on one node before the workload's tasks fail there.
TEMPLATE_TRIES_MAX = 3
#: Nodes on which a task's own crashes killed its process before it is poison.
POISON_NODES = 3
#: A node that says when it will end (a batch allocation) takes nothing new for this long before.
NODE_END_MARGIN_S = 30.0
#: What owners had of the cores counts half after this: long enough that an hour's hoarding is paid back, short enough
#: that nobody waits for long for what he did this morning.
SHARE_HALF_LIFE_S = 600.0
#: Attempts sent to an agent beyond its free slots cover about this much time, judged by the workload's mean.
LOOK_AHEAD_S = 0.05
LOOK_AHEAD_PER_CORE_MAX = 64
