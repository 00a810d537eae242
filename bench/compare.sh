#!/usr/bin/env bash
# Runs Tandem and the PyTorch program in this folder in turn on this machine, and prints their ratios against the targets:
#
#     bench/compare.sh target/release/tandem              # every case
#     bench/compare.sh target/release/tandem two-cards    # one set: one-card, two-cards, small
#     bench/compare.sh target/release/tandem 14b-49-bf16  # one case
#     bench/compare.sh --list
#
# Needs python3 with torch, diffusers, transformers and peft for PyTorch; without them only Tandem runs.
set -euo pipefail
exec python3 "$(dirname "$0")/compare.py" "$@"
