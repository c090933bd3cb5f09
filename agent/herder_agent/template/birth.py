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
        self._plain = plain.life(plan)
        self._general: Life = self._with_task

    def idle(self, parent: int, ends: child.Ends) -> NoReturn:
        """In a child that will be given its tasks."""
        child.run_forked(self._plan, parent, ends)

    def prepare(self, order: child.Order) -> Life:
        """In the template: what the child with this task does, which is to be forked next."""
        return self._plain if plain.prepare(self._plan, order) else self._general

    def over(self) -> None:
        """In the template: the children are forked. It runs no task itself."""
        self._plan.seen.withdraw()

    def _with_task(self, parent: int, ends: child.Ends, order: child.Order) -> NoReturn:
        child.run_forked(self._plan, parent, ends, order)
