"""Our path beside the loop that users write with diffusers and peft, on the same weights, as `mteditflow profile
--compare` has it: four trajectories of a turn of 12 steps, FLUX.1-Kontext-dev's true shape at 512 px.
"""

from dataclasses import replace

import measure
import torch
from test_iteration import SMALL, TRUE, with_rows

from mteditflow.config import DataConfig
from mteditflow.profile.command import build_case
from mteditflow.profile.compare import compare

NUM_ROWS = 4


def test_beside_the_loop_that_users_write(record: measure.Record) -> None:
    config = TRUE if torch.cuda.is_available() else SMALL
    config = replace(config, data=DataConfig(num_turns=1), rollout=replace(config.rollout, group_size=NUM_ROWS))
    figures = compare(build_case(with_rows(config, NUM_ROWS // 2)), num_rounds=1)
    figures["ratio_all"] = figures["ratio"]["all"]
    record.add("compared", figures, {"ratio_all": measure.Goal(value=5.0, is_least=True)})
