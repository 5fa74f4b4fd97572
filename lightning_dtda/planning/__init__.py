"""Forecasts of the cost of recording and attributing, from trials of the first steps and a few examples."""

from lightning_dtda.planning.planning import Forecast, plan
from lightning_dtda.planning.trials import Cost

__all__ = ["Cost", "Forecast", "plan"]
