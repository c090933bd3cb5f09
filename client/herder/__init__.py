"""Herder: Python functions and commands on thousands of cores, a process per task.

Only what is named here is public. Names are loaded when they are first used (PEP 562): running tasks import this
package in children forked a thousand times a second, where `herder.shared` must not cost the import of an event loop.
"""

TYPE_CHECKING = False  # `typing` itself takes six times as long to import as all this
__version__ = "0.1.0"

_HOME = {
    "Client": "herder.client",
    "Completed": "herder.completed",
    "Explanation": "herder.explaining",
    "Future": "herder.futures",
    "Job": "herder.jobs",
    "JobProgress": "herder.jobs",
    "LocalCluster": "herder.local",
    "TaskLogs": "herder.outcomes",
    "TaskUsage": "herder.outcomes",
    "Workload": "herder.workload",
    "current_client": "herder.in_task",
    "shared": "herder.in_task",
    "task": "herder.in_task",
    "task_options": "herder.in_task",
}
_ERRORS = (
    "CommandFailed",
    "ConfigError",
    "DataLost",
    "DependencyFailed",
    "ForkUnsafe",
    "HerderError",
    "JobNotFound",
    "NodeLost",
    "NotSerializable",
    "PayloadTooLarge",
    "ProtocolMismatch",
    "RemoteError",
    "SetupFailed",
    "TaskCrashed",
    "TaskError",
    "TaskOutOfMemory",
    "TaskPoisoned",
    "TaskTimeout",
    "Unauthorized",
    "Unreachable",
    "Unschedulable",
    "VersionMismatch",
)
_HOME.update(dict.fromkeys(_ERRORS, "herder_shared.errors"))

if TYPE_CHECKING:
    from herder.client import Client as Client
    from herder.completed import Completed as Completed
    from herder.explaining import Explanation as Explanation
    from herder.futures import Future as Future
    from herder.in_task import current_client as current_client
    from herder.in_task import shared as shared
    from herder.in_task import task as task
    from herder.in_task import task_options as task_options
    from herder.jobs import Job as Job
    from herder.jobs import JobProgress as JobProgress
    from herder.local import LocalCluster as LocalCluster
    from herder.outcomes import TaskLogs as TaskLogs
    from herder.outcomes import TaskUsage as TaskUsage
    from herder.workload import Workload as Workload
    from herder_shared.errors import CommandFailed as CommandFailed
    from herder_shared.errors import ConfigError as ConfigError
    from herder_shared.errors import DataLost as DataLost
    from herder_shared.errors import DependencyFailed as DependencyFailed
    from herder_shared.errors import ForkUnsafe as ForkUnsafe
    from herder_shared.errors import HerderError as HerderError
    from herder_shared.errors import JobNotFound as JobNotFound
    from herder_shared.errors import NodeLost as NodeLost
    from herder_shared.errors import NotSerializable as NotSerializable
    from herder_shared.errors import PayloadTooLarge as PayloadTooLarge
    from herder_shared.errors import ProtocolMismatch as ProtocolMismatch
    from herder_shared.errors import RemoteError as RemoteError
    from herder_shared.errors import SetupFailed as SetupFailed
    from herder_shared.errors import TaskCrashed as TaskCrashed
    from herder_shared.errors import TaskError as TaskError
    from herder_shared.errors import TaskOutOfMemory as TaskOutOfMemory
    from herder_shared.errors import TaskPoisoned as TaskPoisoned
    from herder_shared.errors import TaskTimeout as TaskTimeout
    from herder_shared.errors import Unauthorized as Unauthorized
    from herder_shared.errors import Unreachable as Unreachable
    from herder_shared.errors import Unschedulable as Unschedulable
    from herder_shared.errors import VersionMismatch as VersionMismatch


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'herder' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
