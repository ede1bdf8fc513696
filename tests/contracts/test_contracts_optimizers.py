"""The built-in optimizers and schedules keep the contracts of their kinds."""

from __future__ import annotations

from sdxl_lora_plugins import optimizers, schedulers
from sdxl_train.testing import OptimizerContract, SchedulerContract


class TestAdamW(OptimizerContract):
    component = optimizers.AdamW


class TestAdamWWithAmsgrad(OptimizerContract):
    component = optimizers.AdamW
    options = {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.9)}


class TestAdam(OptimizerContract):
    component = optimizers.Adam


class TestNAdam(OptimizerContract):
    component = optimizers.NAdam


class TestRAdam(OptimizerContract):
    component = optimizers.RAdam


class TestAdamax(OptimizerContract):
    component = optimizers.Adamax


class TestAdagrad(OptimizerContract):
    component = optimizers.Adagrad
    learning_rate = 0.5


class TestAdadelta(OptimizerContract):
    component = optimizers.Adadelta
    learning_rate = 10.0


class TestRMSprop(OptimizerContract):
    component = optimizers.RMSprop
    options = {"momentum": 0.5}


class TestSgd(OptimizerContract):
    component = optimizers.Sgd


class TestSgdNesterov(OptimizerContract):
    component = optimizers.SgdNesterov


class TestAdafactor(OptimizerContract):
    component = optimizers.Adafactor
    options = {"relative_step": False, "scale_parameter": False}


class TestConstant(SchedulerContract):
    component = schedulers.Constant
    ends_at = 1.0


class TestConstantWithWarmup(SchedulerContract):
    component = schedulers.ConstantWithWarmup
    options = {"lr_warmup_steps": 0.1}
    ends_at = 1.0


class TestLinear(SchedulerContract):
    component = schedulers.Linear
    options = {"lr_warmup_steps": 5}
    ends_at = 0.0


class TestCosine(SchedulerContract):
    component = schedulers.Cosine
    ends_at = 0.0


class TestCosineWithRestarts(SchedulerContract):
    component = schedulers.CosineWithRestarts
    options = {"lr_scheduler_num_cycles": 3}
    ends_at = 0.0


class TestCosineWithMinLr(SchedulerContract):
    component = schedulers.CosineWithMinLr
    options = {"lr_scheduler_min_lr_ratio": 0.1}
    ends_at = 0.1


class TestCosineWarmupWithMinLr(SchedulerContract):
    component = schedulers.CosineWarmupWithMinLr
    options = {"lr_scheduler_min_lr_ratio": 0.1, "lr_warmup_steps": 6}
    ends_at = 0.1


class TestPolynomial(SchedulerContract):
    component = schedulers.Polynomial
    options = {"lr_scheduler_power": 2.0}
    ends_at = 1e-4  # 1e-7 of the highest rate of the contract, 1e-3


class TestInverseSqrt(SchedulerContract):
    component = schedulers.InverseSqrt
    options = {"lr_scheduler_timescale": 20}
    ends_at = 0.5  # sqrt(20 / (20 + 60))


class TestWarmupStableDecay(SchedulerContract):
    component = schedulers.WarmupStableDecay
    options = {"lr_decay_steps": 0.25, "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.2}
    ends_at = 0.2


class TestPiecewiseConstant(SchedulerContract):
    component = schedulers.PiecewiseConstant
    options = {"step_rules": "1:20,0.1:40,0.01"}
    ends_at = 0.01


class TestAdafactorRates(SchedulerContract):
    component = schedulers.AdafactorRates
    ends_at = 1.0


class TestRex(SchedulerContract):
    component = schedulers.Rex
    ends_at = 0.0
