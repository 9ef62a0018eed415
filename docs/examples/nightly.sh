#!/usr/bin/env bash
# One night's gate: is the machine fit, the suite, and the history of all nights.
#
#   LLMSERVE_NIGHT_PROFILE   what is expected of this machine   (dgx-spark)
#   LLMSERVE_NIGHT_SERVER    its server config                  (qwen3-8b-nvfp4)
#   LLMSERVE_NIGHT_ENGINE    never anything else, so that no night passes on the emulated engine (vllm)
#   LLMSERVE_NIGHT_TESTS     expression of markers              (capstone or nightly)
#   LLMSERVE_NIGHT_UPDATE    none, or new for the first five    (none)
#   LLMSERVE_NIGHT_RESULTS   folder, kept from night to night   (nightly)
#
# Exit status: 0 the gate holds, 1 a test failed, was invalid or inconclusive, or the machine is not
# fit; above that pytest's own.
set -euo pipefail

profile=${LLMSERVE_NIGHT_PROFILE:-dgx-spark}
server=${LLMSERVE_NIGHT_SERVER:-qwen3-8b-nvfp4}
engine=${LLMSERVE_NIGHT_ENGINE:-vllm}
tests=${LLMSERVE_NIGHT_TESTS:-capstone or nightly}
update=${LLMSERVE_NIGHT_UPDATE:-none}
results=${LLMSERVE_NIGHT_RESULTS:-nightly}

night=$results/$(date -u +%Y-%m-%dT%H%M%S)
mkdir -p "$night"

# CPU and GPU share the memory: what the page cache holds, the engine may not see as free.
sudo -n /usr/local/sbin/drop-caches 2>/dev/null || echo "The page caches were not dropped."
nvidia-smi >"$night/nvidia-smi.txt" 2>&1 || true

llmserve doctor --server "$server" | tee "$night/doctor.txt"

status=0
pytest -m "$tests" --llmserve-profile "$profile" --llmserve-server "$server" \
  --llmserve-engine "$engine" --llmserve-strict --llmserve-update-baselines "$update" \
  --llmserve-json "$night/result.json" --llmserve-report "$night/report.html" \
  --llmserve-markdown "$night/summary.md" --junitxml "$night/junit.xml" || status=$?

llmserve report "$results"/*/result.json -o "$results/history.html" || true
exit "$status"
