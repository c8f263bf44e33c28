"""AdamW on what a policy trains, and its learning rate over the run."""

import torch

from mteditflow.config import Config
from mteditflow.policy import Policy


def build_optimizer(policy: Policy, config: Config) -> torch.optim.AdamW:
    """AdamW on the trained weights."""
    parameters = [parameter for _, parameter in policy.adapters.trainable]
    o = config.optimizer
    return torch.optim.AdamW(parameters, lr=o.learning_rate, eps=o.epsilon, weight_decay=o.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, iteration: int) -> None:
    """Give the optimizer the learning rate of an iteration."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate(config, iteration)


def learning_rate(config: Config, iteration: int) -> float:
    """The learning rate of an iteration: constant, or falling linearly to 0 at the end of the run."""
    optimizer, end = config.optimizer, config.run.num_iterations
    share = (end - iteration) / end if optimizer.schedule == "linear" else 1.0
    return optimizer.learning_rate * share
