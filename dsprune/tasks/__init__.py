"""Data, labels, losses and metrics of the tasks, and the order in which examples are seen."""

from __future__ import annotations

from dsprune.tasks.base import LabelTask, Task, TaskData
from dsprune.tasks.batching import Encoded
from dsprune.tasks.kinds.text import TextTask
from dsprune.tasks.registry import build_task, task_names

__all__ = ["Encoded", "LabelTask", "Task", "TaskData", "TextTask", "build_task", "task_names"]
