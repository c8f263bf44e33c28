"""Reinforcement learning for multi-turn image editing with flow-matching models (MT-EditFlow, arXiv 2606.01985)."""

import os

# What transformers says at import (that torchvision is missing, which nothing here uses) would bury our one clear line.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
