"""A trajectory of tensors in, numbers and new tensors out. Knows no layer, model or trainer."""

from aiether.geometry.extrapolator import Extrapolator
from aiether.geometry.gram import velocity_gram
from aiether.geometry.history import History
from aiether.geometry.metrics import GeometryMetrics, metrics_from_gram
from aiether.geometry.trajectory import Trajectory

__all__ = ["Extrapolator", "GeometryMetrics", "History", "Trajectory", "metrics_from_gram", "velocity_gram"]
