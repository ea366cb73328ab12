"""Measuring what each part of a model takes at different sizes, and how well a table of it predicts."""

from dsprune.measure.latency.check import CheckReport, check_table
from dsprune.measure.latency.measure import measure_table
from dsprune.measure.latency.models import DenseModel
from dsprune.measure.latency.setting import Setting

__all__ = ["CheckReport", "DenseModel", "Setting", "check_table", "measure_table"]
