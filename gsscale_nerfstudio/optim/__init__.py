"""Deferred Adam."""

from gsscale_nerfstudio.optim.deferred_adam import DeferredAdam as DeferredAdam
from gsscale_nerfstudio.optim.deferred_adam import DeferredAdamConfig as DeferredAdamConfig
from gsscale_nerfstudio.optim.history import AdamHistory as AdamHistory
from gsscale_nerfstudio.optim.noise import MeanNoise as MeanNoise
from gsscale_nerfstudio.optim.pull import Pull as Pull
