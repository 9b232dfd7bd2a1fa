#!/bin/bash
@directives@
# Written by scale-mae submit. It may be read, changed, and submitted again: sbatch @script@
# The run then goes on from its newest checkpoint, on as many nodes as it gets. cluster/README.md is the runbook.
set -uo pipefail

run=@run@
requeue=@requeue@                   # whether this job puts itself back into the queue
preflight=@preflight@                 # whether nodes are looked over first
exclude=@exclude@                  # whether those found unfit are left out at the next start
vain=@vain@                         # so many restarts in a row may make no progress
chain=${1:-1/1}                # place in a chain of jobs
instead=${2:-}                 # not empty: takes the place of a job that found unfit nodes

script=$run/slurm/job.sh
output=$run/slurm/job-$SLURM_JOB_ID.log
outcome=$run/outcome           # how training ended: finished, stopped ..., failed: ...; no such file after a crash
attempts=$run/slurm/attempts   # a line each time that this script began
stop=$run/slurm/stop           # scale-mae cancel leaves this file

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*" | tee -a "$run/log.txt" >&2; }
newest() { (cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-[0-9]*) | tail -n 1 | grep '[0-9]$' || echo start; }

# End for good when that was asked for, or when attempts in a row have all begun at the checkpoint that is still the newest.
give_up() {
  if [ -e "$stop" ]; then say "cancelled${1:+ ($1)}"; exit 0; fi
  if [ "$(awk -v at="at=$(newest)" '{ n = $NF == at ? n + 1 : 0 } END { print n + 0 }' "$attempts")" -gt $vain ]; then
    say "failed: $vain restarts in a row made no progress from $(newest); the last attempt ${1:-was ended from outside}"
    echo "failed: $vain restarts in a row made no progress; the last attempt ${1:-was ended from outside}" > "$outcome"
    exit 1
  fi
}

# Begin anew: this job, or the next of its chain.
again() {
  give_up "$1"
  if $requeue; then
    say "$1; starts again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    say "cannot be put back into the queue; use requeue: false and --chain. Goes on with: sbatch $script"
    exit 1
  fi
  if [ "${chain%/*}" -lt "${chain#*/}" ]; then say "$1; the next job of the chain goes on"; else say "$1; goes on with: sbatch $script"; fi
  exit 0
}

if [ "${chain%/*}" -gt 1 ]; then
  case $(cat "$outcome" 2>/dev/null) in
    finished*) say "the run has finished"; exit 0 ;;
    failed*) say "not started, since an earlier job of the chain failed"; exit 1 ;;
  esac
fi
[ "${SLURM_RESTART_COUNT:-0} ${chain%/*} $instead" = "0 1 " ] && echo "submitted at=" >> "$attempts"
give_up
echo "$(date '+%FT%T') job=$SLURM_JOB_ID nodes=$SLURM_JOB_NODELIST at=$(newest)" >> "$attempts"

# The largest number of nodes, of those that we have, over which the batch divides.
for nodes in @node_counts@; do [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break; done

@setup@
# Code and config as they were at submission; who edits either meanwhile changes nothing here.
export PYTHONPATH=$run/slurm/code${PYTHONPATH:+:$PYTHONPATH}
@environment@
# Training stops when this is near, however long its saves take.
: "${SLURM_JOB_END_TIME:=$(date +%s -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" 2>/dev/null)}"
export SLURM_JOB_END_TIME
# What is compiled at run time stays on each node's own disk, for the next start too.
cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/scale-mae-$(id -un)
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
export CUDA_CACHE_PATH=$cache/cuda MPLCONFIGDIR=$cache/matplotlib

# One process a GPU, or a CPU slot. One that dies takes the others with it in seconds.
launch() {
  srun --nodes="$nodes" --ntasks=$((nodes * @tasks@)) --ntasks-per-node=@tasks@ --kill-on-bad-exit=1@srun@ \
    @inside@ "$@"
}

if $preflight; then
  launch preflight --run-dir "$run"@preflight_options@
  code=$?
  if [ $code != 0 ]; then
    bad=$(paste -sd, "$run/slurm/bad_nodes" 2>/dev/null)
    ended="ended in preflight, exit code $code${bad:+, unfit are $bad}; see $output"
    if [ -n "$bad" ] && $exclude; then
      give_up "$ended"
      # Slurm lets only waiting jobs exclude nodes, so another job takes the place of this one
      next=$(sbatch --parsable --exclude="$bad" "$script" "$chain" instead) && next=${next%%;*} &&
        echo "$next" >> "$run/slurm/jobs" && say "$ended; job $next goes on without them" && exit 0
    fi
    again "$ended"
  fi
fi

say "starts on $SLURM_JOB_NODELIST at $(newest), restart ${SLURM_RESTART_COUNT:-0}"
rm -f "$outcome"
launch pretrain "$run/slurm/config.yaml"
code=$?

ended=$(cat "$outcome" 2>/dev/null)
case $ended in
  finished*) say "$ended"; exit 0 ;;
  failed*) say "$ended"; exit 1 ;;   # starting again would only repeat it
  *) again "${ended:-ended without a word, exit code $code; see $output}" ;;
esac
