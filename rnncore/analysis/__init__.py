"""Where the gradient goes: Jacobians along a trajectory, their products, and what survives many steps."""

from rnncore.analysis.bounds import gradient_bound as gradient_bound
from rnncore.analysis.curve import DecayRate as DecayRate
from rnncore.analysis.curve import HalfLife as HalfLife
from rnncore.analysis.curve import RetentionCurve as RetentionCurve
from rnncore.analysis.jacobians import StepCoefficients as StepCoefficients
from rnncore.analysis.jacobians import step_coefficients as step_coefficients
from rnncore.analysis.jacobians import step_jacobians as step_jacobians
from rnncore.analysis.lstm import direct_retention as direct_retention
from rnncore.analysis.retention import retention_curve as retention_curve
from rnncore.analysis.scaled import ScaledMatrix as ScaledMatrix
from rnncore.analysis.scaled import jacobian_product as jacobian_product
from rnncore.analysis.trajectory import Trajectory as Trajectory
from rnncore.analysis.trajectory import trajectory as trajectory
