"""polyak: averages of PyTorch model weights; exact, matched by name, resumable."""

from polyak._checks import ArgumentError
from polyak.averaged_model import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    RampUpEMA,
    ScheduledAverage,
    StochasticWeightAverage,
)
from polyak.formulas import (
    annealed_momentum,
    decay_to_half_life,
    gamma_to_sigma_rel,
    half_life_to_decay,
    ramp_up_decay,
    sigma_rel_to_gamma,
)
from polyak.names import NameMismatchError
from polyak.schedules import (
    Annealing,
    ClosedForm,
    Exponential,
    InverseGamma,
    Polynomial,
    Power,
    RampUp,
    Schedule,
    TensorFlowWarmup,
    Uniform,
)
from polyak.trajectory import Reconstruction, Trajectory, TrajectoryRecorder
from polyak.weight_average import Distance, WeightAverage

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "ArgumentError",
    "BaseAveragedModel",
    "ClosedForm",
    "Distance",
    "Exponential",
    "ExponentialMovingAverage",
    "InverseGamma",
    "MomentumAnnealingEMA",
    "NameMismatchError",
    "Polynomial",
    "Power",
    "RampUp",
    "RampUpEMA",
    "Reconstruction",
    "Schedule",
    "ScheduledAverage",
    "StochasticWeightAverage",
    "TensorFlowWarmup",
    "Trajectory",
    "TrajectoryRecorder",
    "Uniform",
    "WeightAverage",
    "annealed_momentum",
    "decay_to_half_life",
    "gamma_to_sigma_rel",
    "half_life_to_decay",
    "ramp_up_decay",
    "sigma_rel_to_gamma",
]
