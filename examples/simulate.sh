#!/usr/bin/env bash
# What would the policies save on this trace? Modelled engines in virtual time; no GPU.
# Usage: examples/simulate.sh [TRACE.csv [FOLDER]]
set -euo pipefail
trace=${1:-"$(dirname "$0")/trace.csv"}
out=${2:-out/example}

# --slo-e2e, --slo-tbt: seconds. --length-error 0.3: predicted lengths are off by 30 % at p95.
throttllem simulate --trace "$trace" --gpu a100-40gb-sxm --model llama-3-8b --tp 1 \
    --policy triton,throttllem,least-energy --slo-e2e 15 --slo-tbt 0.1 --length-error 0.3 \
    --out "$out" --json "$out/result.json"
echo "report: $out/report.html"
