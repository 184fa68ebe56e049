#!/usr/bin/env bash
# One command for a machine with a GPU: bash benchmarks/gpu.sh [options of gpu.py]. Under 8 minutes.
# Wheels in .whl/ beside the project are installed for it, so that the machine needs no network. The report goes to $OUT if set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if compgen -G ".whl/*.whl" > /dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/heretic-site .whl/*.whl
    export PYTHONPATH=/tmp/heretic-site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
nvidia-smi || true
exec "$PYTHON" benchmarks/gpu.py ${OUT:+--out "$OUT/gpu.json"} "$@"
