#!/usr/bin/env bash
# The quickstart with more steps, so that the tiny model learns to see: more than an hour on two cores.
#
#   bash examples/tiny/learn.sh [--output DIR]
#
# Started again, it goes on where it stopped; the report counts the time of all starts. Writes runs/learn/report.html
# and docs/results/learn.json and learn.md.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../quickstart.sh" --learn "$@"
