"""Reinforcement learning for multi-turn image editing with flow-matching models (MT-EditFlow, arXiv 2606.01985)."""

import os

# What transformers says at import (that torchvision is missing, which nothing here uses) would bury our one clear line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# OpenMP's threads spin while they wait, which beside any other busy process makes a run up to ten times slower. Read
# when torch is loaded, so here; a user's own setting stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
