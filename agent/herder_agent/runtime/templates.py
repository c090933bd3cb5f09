"""The processes of templates: started, branched, told what to do, heard, and gone.

What they are told is decided by the core; what they say becomes an event. Of their children the `Children` are told.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from herder_agent.core import effects as fx
from herder_agent.core import events
from herder_agent.launch import command, control, forkserver, fresh
from herder_agent.launch.child import Child
from herder_agent.launch.poller import Poller
from herder_agent.runtime.children import Children
from herder_agent.runtime.environments import Environments
from herder_agent.runtime.memory import TemplateWatch
from herder_agent.runtime.oracle import see_template
from herder_agent.runtime.reap import Reaper
from herder_shared.ids import NodeName
from herder_shared.states import Cause
from herder_shared.wire.messages import AuditStep, Payload, WorkloadSpec

if TYPE_CHECKING:
    from herder_agent.runtime.loop import Place

_log = logging.getLogger("herder.agent")


class Templates:
    """Owns every template's process and control socket, by the number that the core gave it."""

    def __init__(
        self,
        place: Place,
        node: NodeName,
        *,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        environments: Environments,
        reaper: Reaper,
        children: Children,
        cloudpickle_path: str,
        dispatch: Callable[[events.Event], None],
        begun: Callable[[Child], None],
        sweep_soon: Callable[[], None],
        left_stuck: Callable[[set[int]], None],
    ) -> None:
        self._place = place
        self._node = node
        self._loop = loop
        self._poller = poller
        self._environments = environments
        self._reaper = reaper
        self._children = children
        self._dispatch = dispatch
        #: Of setup's values, as templates published them.
        self.values = fresh.Values()
        #: Ends templates, and fresh interpreters that are warmed, whose setup takes too much memory.
        self.watch = TemplateWatch(loop)
        self._cloudpickle = cloudpickle_path
        self._begun = begun
        self._sweep_soon = sweep_soon
        self._left_stuck = left_stuck
        self._templates: dict[int, forkserver.Template] = {}
        #: Asked for of the template of this number, and not there yet.
        self._branching: dict[int, int] = {}
        self._gone = asyncio.Event()
        self._is_closing = False

    def start(self, effect: fx.StartTemplate) -> None:
        """Start an interpreter, in the environment that its workload asks for."""
        spec = effect.workload
        template = self._new(effect.template, spec)

        def with_environment(environment: dict[str, str]) -> None:
            if effect.template not in self._templates:
                return
            opening = self._opening_of(spec, effect.publish)
            try:
                kind = "publisher" if effect.publish else "template"
                template.start(environment, self._log_of(spec, kind), opening)
            except OSError as error:
                without(
                    f"the interpreter {(spec.python if spec else None) or 'of the agent'} cannot be started: {error}"
                )
                return
            self._reaper.known.add(template.pid)
            self._limit_memory(template)

        def without(message: str) -> None:
            self._templates.pop(effect.template, None)
            is_users = spec is not None and (spec.prologue is not None or spec.python is not None)
            cause = Cause.SETUP_FAILED if is_users else Cause.START_FAILED
            self._dispatch(events.TemplateFailed(effect.template, cause, message))
            self._dispatch(events.TemplateExited(effect.template, message))

        self._environments.get(spec, with_environment, without)

    def _new(self, number: int, spec: WorkloadSpec | None) -> forkserver.Template:
        template = self._templates[number] = forkserver.Template(
            number,
            spec,
            loop=self._loop,
            poller=self._poller,
            received=self._said,
            exited=self._exited,
        )
        return template

    def _opening_of(self, spec: WorkloadSpec | None, publish: bool = False) -> dict[str, object]:
        return forkserver.open_head(
            spec,
            cluster=self._place.cluster,
            node=self._node,
            cloudpickle_path=self._cloudpickle,
            publish=publish,
        )

    def _log_of(self, spec: WorkloadSpec | None, kind: str = "template") -> Path:
        name = spec.key if spec is not None else "spawner"
        return self._place.state_dir / "logs" / f"{kind}-{name}.log"

    def _limit_memory(self, template: forkserver.Template) -> None:
        spec = template.spec
        if spec is not None and spec.memory_bytes:
            over = partial(self._over, template)
            self.watch.add(template.pid, spec.memory_bytes, lambda: not template.is_ready, over)

    def branch(self, effect: fx.BranchTemplate) -> None:
        """Have a template fork itself. A replica writes where its parent does, a tree to its workload's own log."""
        self._new(effect.template, effect.workload)
        parent = self._templates.get(effect.parent)
        if parent is None:
            self._not_branched(effect.template, "the template that was to fork it is gone")
            return
        self._branching[effect.template] = effect.parent
        is_replica = parent.spec is not None and parent.spec.key == effect.workload.key
        try:
            log = [] if is_replica else [forkserver.open_log(self._log_of(effect.workload))]
        except OSError as error:
            self._not_branched(effect.template, f"its log file cannot be opened: {error}")
            return
        parent.send({"t": "branch", "template": effect.template, "log": bool(log)}, log)
        for fd in log:
            os.close(fd)

    def _branched(self, head: control.Branched, descriptors: list[int]) -> None:
        end, pidfd = descriptors
        template = self._templates.get(head.template)
        self._branching.pop(head.template, None)
        if template is None or self._is_closing:
            os.close(end)  # which ends it
            os.close(pidfd)
            return
        template.adopt(head.pid, end, pidfd, self._log_of(template.spec), self._opening_of(template.spec))
        self._limit_memory(template)
        if template.is_stopping:
            template.stop()

    def _not_branched(self, number: int, message: str) -> None:
        self._branching.pop(number, None)
        if self._templates.pop(number, None) is not None:
            self._dispatch(events.TemplateNotBranched(number, message))

    def stop(self, number: int) -> None:
        """Ask it to end, with its children."""
        if (template := self._templates.get(number)) is not None:
            template.stop()

    def order(self, number: int, head: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        """Tell it to do this; nothing where it is gone, which the core will hear."""
        template = self._templates.get(number)
        if template is not None:
            template.send(head, descriptors)

    def _said(
        self, template: forkserver.Template, head: control.FromTemplate, body: bytes, descriptors: list[int]
    ) -> None:
        number = template.number
        match head:
            case control.Done():
                self._children.done(head, body, descriptors)
            case control.Forked():
                child = self._children.forked(template, head, descriptors)
                self._dispatch(events.ChildForked(head.child, head.pid))
                self._children.begin(child, partial(self._begun, child))
            case control.Branched():
                self._branched(head, descriptors)
            case control.BranchFailed():
                _log.warning("template %d: %s", number, head.message)
                self._not_branched(head.template, head.message)
            case control.Exited():
                self._children.exited(head)
            case control.Stuck():
                self._left_stuck(set(head.pids))
            case control.ForkFailed():
                result = self._not_executed(head) if head.exec else None
                self._children.not_forked(head.child)
                self._dispatch(events.ChildForkFailed(head.child, head.message, result, head.exec))
            case control.Step():
                audited = AuditStep(
                    head.step, head.seconds, head.rss, head.threads, head.verdict, head.findings, head.applied
                )
                self._dispatch(events.TemplateStepped(number, audited))
            case control.Ready():
                if descriptors and template.spec is not None:
                    self.values.keep(template.spec.key, descriptors[0])
                ready = events.TemplateReady(
                    number,
                    head.start,
                    head.fork_point,
                    head.reason,
                    head.python,
                    head.pid,
                    head.start_s,
                    head.rss,
                    head.setup_mode,
                    head.setup_s,
                    head.value,
                    head.not_published,
                    head.shared,
                    head.private,
                    fork_cost_s=head.fork_cost_s,
                    immortal_objects=head.immortal_objects,
                    immortal_off=head.immortal_off,
                    notes=head.notes,
                )
                self._dispatch(ready)
                self.look_at(number)
            case control.Failed():
                self._dispatch(events.TemplateFailed(number, cause_of(head.cause), head.message, head.traceback))
            case control.Log():
                level = logging.getLevelNamesMapping().get(head.level.upper(), logging.INFO)
                _log.log(level, "template %d: %s", number, head.text[:2000])
            case control.Stats():
                pass

    def _over(self, template: forkserver.Template, message: str) -> None:
        self._dispatch(events.TemplateFailed(template.number, Cause.SETUP_FAILED, message))
        template.kill()

    def _exited(self, template: forkserver.Template, message: str) -> None:
        self.watch.remove(template.pid)
        self._templates.pop(template.number, None)
        self._reaper.known.discard(template.pid)
        if not self._templates:
            self._gone.set()
        if not template.is_stopping and not self._is_closing:
            _log.warning("%s", message)
        for branch in [branch for branch, parent in self._branching.items() if parent == template.number]:
            self._not_branched(branch, message)
        self._dispatch(events.TemplateExited(template.number, message))
        self._children.drop_all_of(template.number)
        self._sweep_soon()  # branches which died with it

    def is_there(self, number: int) -> bool:
        """Whether it could be told something."""
        return number in self._templates

    def run(self, number: int, order: dict[str, object], parts: Sequence[bytes]) -> None:
        """Have it fork a child for this task at once."""
        if (template := self._templates.get(number)) is not None:
            template.run(order, parts)

    def look_at(self, number: int) -> None:
        """Look for what its process has grown to."""
        template = self._templates.get(number)
        seen = see_template(number, template.pid) if template is not None and template.pid else None
        if seen is not None:
            self._dispatch(seen)

    def pids(self) -> list[int]:
        """Processes of templates that run, for the account of their memory."""
        return [template.pid for template in self._templates.values() if template.pid]

    def _not_executed(self, head: control.ForkFailed) -> Payload | None:
        """What a shell would say of a command which is not there."""
        if not self._children.is_command(head.child):
            return None
        content = command.not_executed(head.message)
        return Payload(content, None, len(content))

    # The end.

    def end_all(self) -> None:
        """Ask all to end; `wait_gone` waits for it."""
        self._is_closing = True
        for template in list(self._templates.values()):
            if template.pid:
                template.stop()
            else:
                self._templates.pop(template.number)

    async def wait_gone(self) -> None:
        """Until none runs."""
        if self._templates:
            await self._gone.wait()

    def kill_all(self) -> None:
        """SIGKILL to all, without waiting."""
        self._is_closing = True
        for template in self._templates.values():
            template.kill()

    def close(self) -> None:
        """Let go of what belongs to none of them."""
        self.watch.close()
        self.values.close()


def cause_of(text: str) -> Cause:
    """The cause that a template or child named; one that we do not know is a failed start."""
    try:
        return Cause(text)
    except ValueError:
        return Cause.START_FAILED
