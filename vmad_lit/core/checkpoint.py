"""Chains of steps with checkpoints: the public names of `chain`, `schedules` and `store`."""

from .chain import Chain, checkpoint
from .schedules import SCHEDULES
from .store import Disk, keep_on_disk_by

__all__ = ["SCHEDULES", "Chain", "Disk", "checkpoint", "keep_on_disk_by"]
