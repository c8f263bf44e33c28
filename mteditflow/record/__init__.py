"""What a run writes: files that appear whole or not at all, checkpoints, metrics, alarms."""
