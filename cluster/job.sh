#!/bin/bash
@directives@
# Written by scale-mae submit. It may be read, changed, and submitted again: sbatch @script@
# The run then goes on from its newest checkpoint, on as many nodes as it gets. docs/guides/slurm.md describes it.

# In a function, since the site's setup may use the same names.
names() {
  run=@run@
  requeue=@requeue@                   # whether this job puts itself back into the queue
  preflight=@preflight@                 # whether nodes are looked over first
  exclude=@exclude@                  # whether those found unfit are left out at the next start
  vain=@vain@                         # so many restarts in a row may make no progress
  pause=@pause@                       # seconds before starting again after setup, or a preflight that found no node to leave out
  chain=${1:-1/1}                # place in a chain of jobs
  instead=${2:-}                 # not empty: takes the place of a job that found unfit nodes

  script=$run/slurm/job.sh
  output=$run/slurm/job-$SLURM_JOB_ID.log
  exit_status=$run/exit_status           # how training ended: finished, stopped ..., failed: ...; no such file after a crash
  attempts=$run/slurm/attempts   # a line each time that this script began
  excluded=$run/slurm/excluded   # nodes that are left out, one a line
  stop=$run/slurm/stop           # numbers of the jobs that scale-mae cancel stopped, one a line
}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*" | tee -a "$run/log.txt" >&2; }
newest() { (cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-[0-9]*) | tail -n 1 | grep '[0-9]$' || echo start; }
# numbers of this run's other jobs in a state: R, PD
others() { squeue --me --noheader --states="$1" --format='%i %o' | awk -v s="$script" -v me="$SLURM_JOB_ID" 'index($0, " " s) && $1 != me { print $1 }'; }

cancelled() {
  if grep -qx "$SLURM_JOB_ID" "$stop" 2>/dev/null; then
    [ -s "$exit_status" ] || echo "stopped by scale-mae cancel" > "$exit_status"
    say "cancelled${1:+ ($1)}"
    exit 0
  fi
}

# End for good when that was asked for, or when attempts in a row have all begun at the checkpoint that is still the newest.
give_up() {
  cancelled "$@"
  if [ "$(awk -v at="at=$(newest)" '{ n = $NF == at ? n + 1 : 0 } END { print n + 0 }' "$attempts")" -gt $vain ]; then
    say "failed: $vain restarts in a row made no progress from $(newest); the last attempt ${1:-was ended from outside}"
    echo "failed: $vain restarts in a row made no progress; the last attempt ${1:-was ended from outside}" > "$exit_status"
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

# Setup ended this script. Where that was not Slurm ending the job, it begins anew: the node or what is loaded may be at fault.
ended_in_setup() {
  local code=$?
  set +eu
  names "$@"
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%t)" = R ] || exit $code
  sleep $pause
  again "ended in setup, exit code $code; see $output"
}

names "$@"
first=$([ "${SLURM_RESTART_COUNT:-0} ${chain%/*} $instead" = "0 1 " ] && echo true || echo false)   # of this submission
cancelled
other=$(others R | head -n 1)
if [ -n "$other" ]; then say "not started, since job $other has this run"; exit 1; fi
if $first; then
  echo "submitted at=" >> "$attempts"
  rm -f "$exit_status" "$excluded"
elif [ "${chain%/*}" -gt 1 ]; then
  case $(cat "$exit_status" 2>/dev/null) in
    finished*) say "the run has finished"; exit 0 ;;
    failed*) say "not started, since an earlier job of the chain failed"; exit 1 ;;
  esac
fi
give_up
echo "$(date '+%FT%T') job=$SLURM_JOB_ID nodes=$SLURM_JOB_NODELIST at=$(newest)" >> "$attempts"

trap 'ended_in_setup "$@"' EXIT
@setup@
[[ $(trap -p EXIT) == *ended_in_setup* ]] && trap - EXIT   # else it is a trap of setup's own
names "$@"
set +e -uo pipefail

# The largest number of nodes, of those that we have, over which the batch divides.
nodes=0
for fitting in @node_counts@; do [ "$fitting" -le "$SLURM_JOB_NUM_NODES" ] && { nodes=$fitting; break; }; done
[ "$nodes" = 0 ] && { say "failed: the batch does not divide over $SLURM_JOB_NUM_NODES nodes"; exit 1; }

# Ranks are Slurm's, whatever the shell that submitted this had.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
@environment@
# Training stops when this is near, however long its saves take.
unset SLURM_JOB_END_TIME
ends=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)
[ -n "$ends" ] && ends=$(date +%s -d "$ends" 2>/dev/null) && export SLURM_JOB_END_TIME=$ends
# What is compiled at run time stays on each node's own disk, for the next start too.
cache=@cache@
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
export CUDA_CACHE_PATH=$cache/cuda MPLCONFIGDIR=$cache/matplotlib

# One process a GPU, or a CPU slot. One that dies takes the others with it in seconds. The code is that of the submission.
launch() {
  cancelled
  srun --export=ALL --nodes="$nodes" --ntasks=$((nodes * @tasks@)) --ntasks-per-node=@tasks@ --kill-on-bad-exit=1@srun@ \
    @inside@ "$run/slurm/code/run.py" "$@"
}

if $preflight; then
  rm -f "$run/slurm/bad_nodes"
  launch preflight --run-dir "$run"@preflight_options@
  code=$?
  if [ $code != 0 ]; then
    bad=$(paste -sd, "$run/slurm/bad_nodes" 2>/dev/null)
    ended="ended in preflight, exit code $code${bad:+, unfit are $bad}; see $output"
    if [ -n "$bad" ] && $exclude; then
      give_up "$ended"
      cat "$run/slurm/bad_nodes" >> "$excluded"
      without=$(sort -u "$excluded" | paste -sd,)
      # Slurm lets only waiting jobs exclude nodes: the next of the chain, or another job in the place of this one
      if [ "${chain%/*}" -lt "${chain#*/}" ]; then
        for next in $(others PD); do scontrol update JobId="$next" ExcNodeList="$without"; done
      else
        next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" --exclude="$without" "$script" "$chain" instead) &&
          say "$ended; job ${next%%;*} goes on without $without" && exit 0
      fi
    else
      sleep $pause
    fi
    again "$ended"
  fi
fi

say "starts on $SLURM_JOB_NODELIST at $(newest), restart ${SLURM_RESTART_COUNT:-0}"
rm -f "$exit_status"
launch @task@ "$run/slurm/config.yaml"
code=$?

ended=$(cat "$exit_status" 2>/dev/null)
case $ended in
  finished*) say "$ended"; exit 0 ;;
  failed*) say "$ended"; exit 1 ;;   # starting again would only repeat it
  *) again "${ended:-ended without a word, exit code $code; see $output}" ;;
esac
