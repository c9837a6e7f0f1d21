"""What the figures of a report show, as plain data: ``html`` and ``figures`` draw the same charts, each in its way."""

from .all_charts import charts
from .model import Chart, Heat, Panel, Series

__all__ = ["Chart", "Heat", "Panel", "Series", "charts"]
