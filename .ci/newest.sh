#!/usr/bin/env bash
# README's tests with the newest versions that settings.ini allows, in an environment of its own: a step of `.ci/run full`.
# .ci/newest.sh [folder of the environment, kept; without it a temporary one]
set -euo pipefail
cd "$(dirname "$0")/.."
place=${1:-$(mktemp -d)/newest}
[ -n "${1:-}" ] || trap 'rm -rf "$(dirname "$place")"' EXIT
python3 -m venv "$place"
. "$place/bin/activate"
# without the variable pip would follow its own settings' bounds, where a machine has some
PIP_CONSTRAINT=/dev/null pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
pip list 2>/dev/null | grep -iE '^(torch|transformers|datasets|accelerate|gradio|openai|fastcore|nbdev) '
OMP_NUM_THREADS=1 nbdev_test --n_workers 2
