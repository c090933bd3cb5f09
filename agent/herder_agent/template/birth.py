"""How the children of a sealed template begin: idle ones, and those that are forked with their task.

Made in the template, before the first fork, and used by `serve`, which knows neither plans nor tasks.
"""

from __future__ import annotations

from . import child, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    #: What a child does, given its parent, its ends and its task.
    Life = Callable[[int, child.Ends, child.Order], NoReturn]


class Births:
    """What a template's children do."""

    def __init__(self, plan: child.Plan) -> None:
        self._plan = plan
        prepare, plain_life = plain.preparation(plan), plain.life(plan)

        def with_task(parent: int, ends: child.Ends, order: child.Order) -> NoReturn:
            child.run_forked(plan, parent, ends, order)

        def way_of(order: child.Order) -> Life:
            return plain_life if prepare(order) else with_task

        #: In the template: what the child with this task does, which is to be forked next.
        self.way_of = way_of

    def idle(self, parent: int, ends: child.Ends) -> NoReturn:
        """In a child that will be given its tasks."""
        self._plan.seen.withdraw()
        child.run_forked(self._plan, parent, ends)
