#!/usr/bin/env bash
# On the machine, second call: build the mirror, run pieces, and pack what they wrote: `tests/device/run.sh PIECE…`.
set -euo pipefail
cd "$(dirname "$0")/../.."
cp -r .device/data/. /tmp/device-data/
[ -d /tmp/device-mirror/cifar-10-batches-py ] || python3 /tmp/device-data/unpack.py /tmp/device-mirror
export DISTILL_DATA_MIRROR=/tmp/device-mirror PYTHONPATH=$PWD
pack() { tar c $(ls -d data/pretrained data/cifar10/pieces 2>/dev/null) | split -b 15M - "$OUT/pretrained.tar."; }
trap pack EXIT
python3 -m lib.pipeline.pieces --commit "$(cat .device/commit)" "$@" 2>&1 | tee "$OUT/run.log"
