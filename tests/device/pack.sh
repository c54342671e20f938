#!/usr/bin/env bash
# Fill .device with what the first or the second call carries: `tests/device/pack.sh 1`, then `tests/device/pack.sh 2`.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=../shared/data
rm -rf .device && mkdir -p .device/data/cifar-10-lossless
grep -qxF /.device .git/info/exclude 2>/dev/null || echo /.device >> .git/info/exclude
git rev-parse HEAD > .device/commit

download() { # the pinned wheels of some packages, into a folder
  python -m pip download --quiet --no-deps --only-binary=:all: --python-version "${DEVICE_PYTHON:-3.12}" \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform any --dest ".device/$1" \
    $(grep -oE "^($2)==[^ ;]+" requirements.txt)
}

case "${1:?expected 1 or 2, got nothing}" in
  1)
    cp "$data"/cifar-10-lossless/data_batch_[123].* .device/data/cifar-10-lossless/
    download wheels 'annotated-types|arrow|diffusers|fastjsonschema|fqdn|importlib-metadata|isoduration|jsonpointer|jsonschema|jsonschema-specifications|nbformat|platformdirs|pooch|pydantic|pydantic-core|referencing|rfc3339-validator|rfc3986-validator|rpds-py|ruamel-yaml|torchattacks|traitlets|typing-inspection|uri-template|webcolors|zipp'
    download extra 'huggingface-hub|httpx2|httpcore2|truststore|h11|idna'
    ;;
  2)
    cp "$data"/cifar-10-lossless/{data_batch_[45],test_batch}.* "$data"/cifar-10-lossless/batches.meta .device/data/cifar-10-lossless/
    cp "$data"/unpack.py "$data"/*SUMS* .device/data/
    ;;
  *) echo "expected 1 or 2, got $1" >&2; exit 1 ;;
esac
du -sh .device
