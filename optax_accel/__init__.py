"""Training-acceleration methods from the literature as composable Optax transformations."""
# ruff: noqa: I001  (grouped by family, not by module name)

from optax_accel import curvature, equilibrium

# The loss as a value
from optax_accel.accumulation import mean_over_micro_batches
from optax_accel.objective import Objective

# Dominant and bulk Hessian subspace
from optax_accel.curvature import BlockTracker, ExactTracker, GradientTracker
from optax_accel.curvature import RoundRobinTracker, Tracker
from optax_accel.subspace import InterpolateSubspacesState, interpolate_subspaces
from optax_accel.subspace import project_to_bulk, project_to_dominant
from optax_accel.subspace import bulk_sgd, dom_sgd, interpolated_sgd

# The curvature that an optimizer sees, watched while it trains
from optax_accel.curvature.monitor import CurvatureRecord, MonitorCurvatureState
from optax_accel.curvature.monitor import monitor_curvature

# What an optimizer consists of
from optax_accel.description import Description, describe

# Curvature refreshed from the host
from optax_accel.refresh import Refresh, RefreshSchedule, refresh_at

# Momentum: decaying, quasi-hyperbolic, aggregated, tuned by itself
from optax_accel.momentum import ScaleByDemonAdamState, scale_by_demon, scale_by_demon_adam
from optax_accel.momentum import demon_adam, demon_schedule, demon_sgd
from optax_accel.momentum import ScaleByQHMState, ScaleByQHAdamState, qhm, qh_adam
from optax_accel.momentum import scale_by_qhm, scale_by_qh_adam
from optax_accel.momentum import QHMParameters, QHAdamParameters, qh_adam_from_nadam
from optax_accel.momentum import qhm_from_accsgd, qhm_from_pid, qhm_from_synthesized_nesterov
from optax_accel.momentum import ScaleByAggMoState, aggmo, aggmo_betas, scale_by_aggmo
from optax_accel.momentum import ScaleByYellowFinState, scale_by_yellowfin, yellowfin

# Moments in low-rank subspaces of the gradients
from optax_accel.low_rank import LowRankBytes, ScaleByAdaRankGradState, ScaleByGaLoreState
from optax_accel.low_rank import adarankgrad, galore, low_rank_bytes
from optax_accel.low_rank import scale_by_adarankgrad, scale_by_galore

# A few entries of each tensor
from optax_accel.sparse import SparseIncrementsState, sift, sparse_increments

# Forward gradients, without back-propagation
from optax_accel.gradients import ForwardGradientState, Taps
from optax_accel.gradients import forward_gradient, forward_value_and_grad

# Pruning
from optax_accel.sparse import KeepPrunedState, SharpnessDirectedState
from optax_accel.sparse import keep_pruned, sharpness_directed, smallest_entries
from optax_accel.sparse import el2n_scores, predicted_increase, select_examples

# Epochs sampled instead of trained
from optax_accel.sparse import GradSampState, gradsamp, sample_epoch, skip_epoch

# Feedback alignment
from optax_accel.gradients import dfa_feedback, dfa_value_and_grad, feedback_alignment

# Gradient sampling
from optax_accel.gradients import SampleGradientsState, sample_gradients
from optax_accel.gradients import bernoulli_per_element, bernoulli_per_tensor
from optax_accel.gradients import stoch_grad_adam

# Sampled tensor operations
from optax_accel.gradients import SampledProductGradientsState, SampledTerms, sample_products
from optax_accel.gradients import sample_terms, sampled_product_gradients
from optax_accel.gradients import sampled_conv, sampled_conv_general_dilated
from optax_accel.gradients import sampled_dot_general, sampled_matmul

# Extragradient
from optax_accel.extrapolation import ExtragradientState, extragradient
from optax_accel.extrapolation import extra_adam, extrap_sgd

# Ensembles in place of gradients
from optax_accel.data_assimilation import ESMDAState, enkf, esmda, esmda_step

# Natural gradient
from optax_accel.natural_gradient import HessianFreeState, ScaleByKFACState, describe_layers
from optax_accel.natural_gradient import LevenbergMarquardt, QuadraticModelState, TrustRegion
from optax_accel.natural_gradient import quadratic_model
from optax_accel.natural_gradient import ScaleByBatchGaussNewtonState, batch_gauss_newton
from optax_accel.natural_gradient import scale_by_batch_gauss_newton
from optax_accel.natural_gradient import ekfac, hessian_free, kfac, scale_by_ekfac, scale_by_kfac

# Equilibrium layers, and Anderson acceleration of training itself
from optax_accel.equilibrium import AndersonAccelerationState, anderson_acceleration, deq

# Gradient norm penalty
from optax_accel.gradient_norm import GNPState, gnp

# Other coordinates of the parameters
from optax_accel.reparametrization import Reparametrization, ReparametrizeState, reparametrize
from optax_accel.reparametrization import powerprop, weight_norm

# Adaptive rates within bounds
from optax_accel.adabound import ScaleByAdaBoundState, adabound, scale_by_adabound

# Workers with parameters of their own
from optax_accel.workers import DecentralizedState, PostLocalSGDState, topologies
from optax_accel.workers import decentlam, dmsgd, post_local_sgd

# Schedules that Optax lacks
from optax_accel.schedules import OneCycle, cyclical_schedule, momentum_onecycle_schedule
from optax_accel.schedules import onecycle, snapshot_schedule, vtpc_schedule

# Finding a learning rate
from optax_accel.range_test import LearningRateCurve, learning_rate_range_test

# Mixed precision
from optax_accel.loss_scaling import DynamicLossScaleState, dynamic_loss_scale

# Hyperparameters that change
from optax_accel.hyperparams import WithSchedulesState, with_schedules
from optax_accel.hyperparams import inject_hyperparams, static_arguments

# States spread over devices
from optax_accel.sharding import state_shardings

__all__ = [
    "AndersonAccelerationState",
    "BlockTracker",
    "CurvatureRecord",
    "DecentralizedState",
    "Description",
    "DynamicLossScaleState",
    "ESMDAState",
    "ExactTracker",
    "ExtragradientState",
    "ForwardGradientState",
    "GNPState",
    "GradSampState",
    "GradientTracker",
    "HessianFreeState",
    "InterpolateSubspacesState",
    "KeepPrunedState",
    "LearningRateCurve",
    "LevenbergMarquardt",
    "LowRankBytes",
    "MonitorCurvatureState",
    "Objective",
    "OneCycle",
    "PostLocalSGDState",
    "QHAdamParameters",
    "QHMParameters",
    "QuadraticModelState",
    "Refresh",
    "RefreshSchedule",
    "Reparametrization",
    "ReparametrizeState",
    "RoundRobinTracker",
    "SampleGradientsState",
    "SampledProductGradientsState",
    "SampledTerms",
    "ScaleByAdaBoundState",
    "ScaleByAdaRankGradState",
    "ScaleByAggMoState",
    "ScaleByBatchGaussNewtonState",
    "ScaleByDemonAdamState",
    "ScaleByGaLoreState",
    "ScaleByKFACState",
    "ScaleByQHAdamState",
    "ScaleByQHMState",
    "ScaleByYellowFinState",
    "SharpnessDirectedState",
    "SparseIncrementsState",
    "Taps",
    "Tracker",
    "TrustRegion",
    "WithSchedulesState",
    "adabound",
    "adarankgrad",
    "aggmo",
    "aggmo_betas",
    "anderson_acceleration",
    "batch_gauss_newton",
    "bernoulli_per_element",
    "bernoulli_per_tensor",
    "bulk_sgd",
    "curvature",
    "cyclical_schedule",
    "decentlam",
    "demon_adam",
    "demon_schedule",
    "demon_sgd",
    "deq",
    "describe",
    "describe_layers",
    "dfa_feedback",
    "dfa_value_and_grad",
    "dmsgd",
    "dom_sgd",
    "dynamic_loss_scale",
    "ekfac",
    "el2n_scores",
    "enkf",
    "equilibrium",
    "esmda",
    "esmda_step",
    "extra_adam",
    "extragradient",
    "extrap_sgd",
    "feedback_alignment",
    "forward_gradient",
    "forward_value_and_grad",
    "galore",
    "gnp",
    "gradsamp",
    "hessian_free",
    "inject_hyperparams",
    "interpolate_subspaces",
    "interpolated_sgd",
    "keep_pruned",
    "kfac",
    "learning_rate_range_test",
    "low_rank_bytes",
    "mean_over_micro_batches",
    "momentum_onecycle_schedule",
    "monitor_curvature",
    "onecycle",
    "post_local_sgd",
    "powerprop",
    "predicted_increase",
    "project_to_bulk",
    "project_to_dominant",
    "qh_adam",
    "qh_adam_from_nadam",
    "qhm",
    "qhm_from_accsgd",
    "qhm_from_pid",
    "qhm_from_synthesized_nesterov",
    "quadratic_model",
    "refresh_at",
    "reparametrize",
    "sample_epoch",
    "sample_gradients",
    "sample_products",
    "sample_terms",
    "sampled_conv",
    "sampled_conv_general_dilated",
    "sampled_dot_general",
    "sampled_matmul",
    "sampled_product_gradients",
    "scale_by_adabound",
    "scale_by_adarankgrad",
    "scale_by_aggmo",
    "scale_by_batch_gauss_newton",
    "scale_by_demon",
    "scale_by_demon_adam",
    "scale_by_ekfac",
    "scale_by_galore",
    "scale_by_kfac",
    "scale_by_qh_adam",
    "scale_by_qhm",
    "scale_by_yellowfin",
    "select_examples",
    "sharpness_directed",
    "sift",
    "skip_epoch",
    "smallest_entries",
    "snapshot_schedule",
    "sparse_increments",
    "state_shardings",
    "static_arguments",
    "stoch_grad_adam",
    "topologies",
    "vtpc_schedule",
    "weight_norm",
    "with_schedules",
    "yellowfin",
]
