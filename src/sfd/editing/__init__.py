"""Editing by streams: what is where and how it looks are changed apart. See docs/editing.md."""

from sfd.editing.edits import change_plan, edit, interpolate_plans, keep_plan, mixed_noise, paint, sdedit, swap_plans
from sfd.editing.follow import Follow, follow

__all__ = [
    "Follow",
    "change_plan",
    "edit",
    "follow",
    "interpolate_plans",
    "keep_plan",
    "mixed_noise",
    "paint",
    "sdedit",
    "swap_plans",
]
