"""AdamW on what a policy trains, and its learning rate over the run."""

import torch
from torch import Tensor

from mteditflow.config import Config
from mteditflow.distributed import Ranks
from mteditflow.policy import Policy
from mteditflow.transformer.adapters import Adapters
from mteditflow.transformer.sharded import cut_like

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, which lie as the parameter does


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


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW keeps, by `<number of the parameter>.<name>`; of what is cut, this rank's part."""
    named = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in named.items() for key, value in values.items()}


def moments_like(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """For each moment of `optimizer_state`, before there are any, the parameter as which it lies."""
    return {f"{i}.{name}": weight for i, weight in enumerate(_parameters(optimizer)) for name in MOMENTS}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, cut as the parameters are, or whole on every rank."""
    parameters, states = _parameters(optimizer), dict[int, dict[str, Tensor]]()
    for key, value in state.items():
        index, name = key.split(".", 1)
        is_moment = name in MOMENTS
        states.setdefault(int(index), {})[name] = cut_like(parameters[int(index)], value) if is_moment else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def check_weights(adapters: Adapters, optimizer: torch.optim.Optimizer, done: int, ranks: Ranks) -> None:
    """Raise ValueError on every rank, before anything is saved or scored by them, where the updates of the iteration
    that is `done` left weights that are not finite.
    """
    is_broken = torch.tensor(int(not adapters.is_finite()), device=ranks.device)
    ranks.max_(is_broken)
    if is_broken:
        raise ValueError(
            f"weights are not finite after the updates of iteration {done}, and not saved: optimizer.learning_rate is "
            f"{optimizer.param_groups[0]['lr']:g}, lower it and begin in another run.folder"
        )
