#!/usr/bin/env bash
# The keeper of clocks as a systemd service. Prints the unit; nothing is changed.
# Usage: examples/keeper.sh USER UUID=LOWEST-HIGHEST ... > throttllem-keeper.service
#   USER may lease clocks; the UUIDs are those of `throttllem doctor`, the clocks are MHz.
# Then, as root:
#   install -m 644 throttllem-keeper.service /etc/systemd/system/
#   systemctl daemon-reload && systemctl enable --now throttllem-keeper
# What root runs should belong to root: set THROTTLLEM to an installation in /opt (docs/keeper.md).
set -euo pipefail
user=$1
shift
gpus=()
for range in "$@"; do
    gpus+=(--gpu "$range")
done
exec "${THROTTLLEM:-throttllem}" keeper "${gpus[@]}" --user "$user" --unit
