"""MT-EditFlow (arXiv 2606.01985): reinforcement learning of multi-turn image editing. `torchrun -m mteditflow.train`

    for each iteration
        1. roll out: P tasks, G trajectories each, K turns on the model's own output                         rollout.py
        2. score every trajectory (was each instruction followed, was the rest left alone), fuse the rewards
           at the advantage level, and broadcast the one advantage to every turn and denoising step     advantage.py
           (waves of trajectories are scored while the next are rolled out)                         reward/overlap.py
        3. update the adapter by GRPO or NFT                              update.py, objective/grpo.py, nft.py

Departures from the paper, each a config field: SDE windows train 2 of the S steps (Flow-GRPO-Fast), by default the
embedded world's exact verifier takes the VLM judge's place, and the adapter is averaged (EMA) for evaluation and
export.
"""

import sys

from mteditflow.config import command

if __name__ == "__main__":  # before torch is imported: --help and wrong arguments answer at once
    sys.exit(command.main(["train", *sys.argv[1:]]))

from mteditflow_kernels import use_backend

from mteditflow.config import Config
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.guards import check_adapter
from mteditflow.objective import build_objective
from mteditflow.policy.optimizer import set_learning_rate
from mteditflow.record.clock import traced
from mteditflow.record.metrics import score_figures
from mteditflow.reward import Judged
from mteditflow.rollout import sample_waves
from mteditflow.run import Run
from mteditflow.update import update


def train(config: Config, ranks: Ranks) -> None:
    """Run, or continue, the training that `config` describes in its run folder."""
    use_backend(config.run.backend)
    objective, is_adapter_checked = build_objective(config), False
    with Run(config, objective, ranks) as run:
        policy, optimizer, judge = run.policy, run.optimizer, run.judge
        for iteration in traced("iteration", run.iterations()):
            # 1. Roll out K turns on the model's own output, wave by wave; a wave is scored while the next is made.
            tasks = training_tasks(config, iteration, ranks)
            rollout = judge.gather(sample_waves(policy, objective, tasks, config, iteration, ranks))

            # 2. Give every trajectory one advantage relative to its group, as soon as the group is scored.
            judged = Judged(judge.scores(), config, ranks)

            # 3. Update the adapter; the old policy follows it.
            set_learning_rate(optimizer, config, iteration)
            figures = update(policy, optimizer, objective, rollout, judged, config, ranks)
            if objective.has_old:
                num_updates = (iteration + 1) * config.optimizer.num_updates
                policy.adapters.copy("current", "old", decay=objective.old_decay(num_updates))

            if not is_adapter_checked and judged.advantages.any():
                check_adapter(policy, rollout, config)
                is_adapter_checked = True
            figures |= score_figures(judged.scores, judged.advantages, judged.group, config.advantage)
            run.record(iteration, figures, rollout, judged)
        run.finish()
