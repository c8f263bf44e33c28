"""MT-EditFlow (arXiv 2606.01985): reinforcement learning of multi-turn image editing. `torchrun -m mteditflow.train`

    for each iteration
        P tasks, G trajectories each: roll out K turns on the model's own output
        score every trajectory: was each instruction followed, was the rest left alone
        fuse the rewards at the advantage level and broadcast the one advantage to every turn and denoising step
        update the adapter by GRPO (or NFT)

Departures from the paper, each a config field: SDE windows train 2 of the S steps (Flow-GRPO-Fast), by default the
embedded world's exact verifier takes the VLM judge's place, and the adapter is averaged (EMA) for evaluation and
export.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mteditflow import cli

if TYPE_CHECKING:
    from mteditflow.config import Config
    from mteditflow.distributed import Ranks


def train(config: "Config", ranks: "Ranks") -> None:
    """Run, or continue, the training that `config` describes in its run folder."""
    from mteditflow_kernels import use_backend

    from mteditflow.advantage import advantages
    from mteditflow.alarms import of_rollout
    from mteditflow.data import training_tasks
    from mteditflow.metrics import Timer, of_scores
    from mteditflow.reward import of_all_ranks
    from mteditflow.rollout import sample_rollout
    from mteditflow.run import Run
    from mteditflow.update import check_adapter, check_scores, update

    use_backend(config.run.backend)
    timer, is_adapter_checked = Timer(), False
    with Run(config, ranks, timer) as run:
        policy, optimizer, reward = run.policy, run.optimizer, run.reward
        for iteration in range(run.first_iteration, config.run.num_iterations):
            tasks = training_tasks(config, iteration, ranks)
            with timer("time/rollout"):
                rollout = sample_rollout(policy, tasks, config, iteration)
            with timer("time/score"):
                scores, group = of_all_ranks(reward(rollout, iteration), rollout.group, ranks)
                check_scores(scores, config)
            advantage = advantages(scores, group, config.advantage)
            with timer("time/update"):
                own = advantage.chunk(ranks.world_size)[ranks.rank]
                figures = update(policy, optimizer, rollout, own, config, iteration, ranks)
            if not is_adapter_checked and advantage.any():
                check_adapter(policy, rollout)
                is_adapter_checked = True
            run.record(iteration, of_scores(scores, advantage, group) | figures | of_rollout(rollout, scores))
            if run.is_stopping:
                return
        run.finish()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: `python -m mteditflow.train [--config FILE] [--section.field VALUE ...] [--dry_run]`."""
    config, is_dry_run = cli.parse(argv, prog="python -m mteditflow.train")
    from mteditflow import distributed
    from mteditflow.checkpoint import is_no_room
    from mteditflow.update import GuardError

    if is_dry_run:
        from mteditflow.plan import dry_run

        try:
            plan = dry_run(config)
        except ValueError as error:
            cli.fail(error)
        print(plan.table)
        if plan.problem:
            cli.fail(plan.problem)
        return
    with ExitStack() as stack:
        ranks = distributed.start()
        stack.callback(distributed.stop, ranks)
        try:
            train(config, ranks)
        except (ValueError, GuardError) as error:
            cli.fail(error)
        except OSError as error:
            if not is_no_room(error):
                raise
            cli.fail(f"no room on the disk for {config.run.folder}: free some and run again")


if __name__ == "__main__":
    main()
