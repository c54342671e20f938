#!/usr/bin/env bash
# On the machine, first call: install the wheels, keep the data, and import what the second call needs.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p /tmp/device-data
cp -r .device/data/. /tmp/device-data/
python3 -m pip install --quiet --no-index --no-deps .device/wheels/*.whl
python3 -c "import diffusers.models.unets.unet_2d" || python3 -m pip install --quiet --no-index --no-deps .device/extra/*.whl
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
PYTHONPATH=$PWD python3 -m lib.pipeline.pieces
