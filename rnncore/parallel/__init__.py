"""Parallel in time: a run as one system of equations for all states, solved by Newton's method."""

from rnncore.parallel.forecast import Forecast as Forecast
from rnncore.parallel.forecast import forecast as forecast
from rnncore.parallel.unroll import Solution as Solution
from rnncore.parallel.unroll import unroll as unroll
