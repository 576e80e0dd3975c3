"""Plots of the results of `rnncore.analysis`, and the report of a run; needs matplotlib."""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`rnncore.analysis.plots` draws with matplotlib, which is not installed: pip install rnncore[plots]"
    ) from error

from rnncore.analysis.plots.curves import retention as retention
from rnncore.analysis.plots.curves import retention_over_training as retention_over_training
from rnncore.analysis.plots.gates import gate_saturation as gate_saturation
from rnncore.analysis.plots.gates import path_shares as path_shares
from rnncore.analysis.plots.gates import timescale_histogram as timescale_histogram
from rnncore.analysis.plots.gradients import gradient_heatmap as gradient_heatmap
from rnncore.analysis.plots.gradients import gradient_maps as gradient_maps
from rnncore.analysis.plots.gradients import saliency as saliency
from rnncore.analysis.plots.gradients import weight_gradient_bars as weight_gradient_bars
from rnncore.analysis.plots.spectra import eigenvalues as eigenvalues
from rnncore.analysis.plots.spectra import lyapunov as lyapunov
from rnncore.analysis.plots.spectra import lyapunov_convergence as lyapunov_convergence
from rnncore.analysis.plots.spectra import singular_fan as singular_fan
from rnncore.analysis.plots.trajectory_page import report_trajectory as report_trajectory
