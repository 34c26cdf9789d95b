"""From tasks to nodes: which may take a task, which is best, and why none does."""

from swarm.schedule.constraints import Constraint, parse_constraint, parse_spread
from swarm.schedule.explain import why_pending
from swarm.schedule.filters import fits, surplus
from swarm.schedule.stage import decide

__all__ = ["Constraint", "decide", "fits", "parse_constraint", "parse_spread", "surplus", "why_pending"]
