#!/bin/bash
@directives@
# Written by scale-mae submit. You may read it, change it, and submit it again: sbatch @script@
# The run then resumes from its newest checkpoint, on as many nodes as Slurm grants. See docs/guides/slurm.md.

# The variables of this script. They are set again after the site's setup, because setup may use the same names.
set_variables() {
  run=@run_dir@
  requeue=@requeue@               # whether this job requeues itself
  preflight=@preflight@             # whether the nodes are checked before training
  exclude_bad_nodes=@exclude_bad_nodes@     # whether later starts exclude the nodes that preflight reports as bad
  max_restarts=@max_restarts_without_progress@  # give up after this many restarts in a row without a new checkpoint
  pause=@pause_seconds@                    # seconds to wait before a restart after a failed setup or preflight
  chain=${1:-1/1}             # POSITION/LENGTH in a chain of jobs
  replacement=${2:-}          # not empty: this job replaces a job whose preflight reported bad nodes

  script=$run/slurm/job.sh
  output=$run/slurm/job-$SLURM_JOB_ID.log
  exit_status=$run/exit_status         # how training ended: finished, stopped ..., failed: ...; does not exist after a crash
  attempts=$run/slurm/attempts         # one line for each start of this script
  bad_nodes=$run/slurm/bad_nodes       # nodes that the last preflight reported as bad, one per line
  excluded=$run/slurm/excluded_nodes   # nodes that later starts exclude, one per line
  cancelled=$run/slurm/cancelled_jobs  # numbers of the jobs that scale-mae cancel stopped, one per line
}

log_message() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*" | tee -a "$run/log.txt" >&2; }

# Print the name of the newest checkpoint, or "none".
newest_checkpoint() {
  (cd "$run/checkpoints" 2>/dev/null && printf '%s\n' step-[0-9]*) | tail -n 1 | grep '[0-9]$' || echo none
}

# Print the numbers of the other jobs of this run in a state: R (running) or PD (pending).
other_jobs() {
  squeue --me --noheader --states="$1" --format='%i %o' |
    awk -v script="$script" -v own="$SLURM_JOB_ID" 'index($0, " " script) && $1 != own { print $1 }'
}

is_last_of_chain() { [ "${chain%/*}" -ge "${chain#*/}" ]; }

# End this job if scale-mae cancel listed it. $1: why the attempt ended.
exit_if_cancelled() {
  if grep -qx "$SLURM_JOB_ID" "$cancelled" 2>/dev/null; then
    [ -s "$exit_status" ] || echo "stopped by scale-mae cancel" > "$exit_status"
    log_message "Cancelled${1:+ ($1)}."
    exit 0
  fi
}

# End this job if it was cancelled, or if too many attempts in a row started from the checkpoint that is still the newest.
# $1: why the attempt ended. It is empty at the start of the script: a node failure or a requeue leaves no message.
exit_without_progress() {
  exit_if_cancelled "$@"
  local checkpoint repeats reason restarts="$max_restarts restarts"
  checkpoint=$(newest_checkpoint)
  repeats=$(awk -v last="checkpoint=$checkpoint" '{ n = $NF == last ? n + 1 : 0 } END { print n + 0 }' "$attempts")
  if [ "$repeats" -gt "$max_restarts" ]; then
    [ "$max_restarts" = 1 ] && restarts="1 restart"
    reason="no new checkpoint after $restarts. Newest checkpoint: $checkpoint. Last attempt: ${1:-ended without a message}"
    log_message "Run failed: $reason"
    echo "failed: $reason" > "$exit_status"
    exit 1
  fi
}

# Restart: requeue this job, or leave the run to the next job of the chain. $1: why the attempt ended.
restart_run() {
  local reason=${1%.}
  exit_without_progress "$reason"
  if $requeue; then
    log_message "Attempt ended: $reason. The job requeues itself."
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    log_message "Slurm rejects the requeue. To resume now: sbatch $script"
    log_message "For later runs, set requeue: false in the site file and submit with --chain."
    exit 1
  fi
  if is_last_of_chain; then
    log_message "Attempt ended: $reason. To resume: sbatch $script"
  else
    log_message "Attempt ended: $reason. The next job of the chain resumes the run."
  fi
  exit 0
}

# Setup ended this script. Unless Slurm is ending the job, restart: the node or a loaded module may be at fault.
exit_from_setup() {
  local code=$?
  set +eu
  set_variables "$@"
  [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%t)" = R ] || exit $code
  sleep "$pause"
  restart_run "setup ended with exit code $code (see $output)"
}

set_variables "$@"
# whether this is the first start since scale-mae submit or sbatch
first_start=$([ "${SLURM_RESTART_COUNT:-0} ${chain%/*} $replacement" = "0 1 " ] && echo true || echo false)
exit_if_cancelled
other=$(other_jobs R | head -n 1)
if [ -n "$other" ]; then
  log_message "Not started: job $other of this run is already running."
  exit 1
fi
if $first_start; then
  echo "submitted checkpoint=" >> "$attempts"   # restarts are counted from here
  rm -f "$exit_status" "$excluded"
elif [ "${chain%/*}" -gt 1 ]; then
  case $(cat "$exit_status" 2>/dev/null) in
    finished*) log_message "Not started: the run is finished."; exit 0 ;;
    failed*) log_message "Not started: an earlier job of the chain failed."; exit 1 ;;
  esac
fi
exit_without_progress
echo "$(date '+%FT%T') job=$SLURM_JOB_ID nodes=$SLURM_JOB_NODELIST checkpoint=$(newest_checkpoint)" >> "$attempts"

trap 'exit_from_setup "$@"' EXIT
@setup@
[[ $(trap -p EXIT) == *exit_from_setup* ]] && trap - EXIT   # setup may have set its own trap, which then stays
set_variables "$@"
set +e -uo pipefail

# Use the largest number of granted nodes over which the global batch divides.
nodes=0
for count in @node_counts@; do [ "$count" -le "$SLURM_JOB_NUM_NODES" ] && { nodes=$count; break; }; done
if [ "$nodes" = 0 ]; then
  log_message "Failed: the job has $SLURM_JOB_NUM_NODES nodes, but train.global_batch divides only over: @node_counts@."
  exit 1
fi

# Slurm defines the ranks. Ignore rank variables of the shell that submitted the job.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
@environment@
# Training reads the job's end time and stops early enough for a save.
unset SLURM_JOB_END_TIME
end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)
[ -n "$end" ] && end=$(date +%s -d "$end" 2>/dev/null) && export SLURM_JOB_END_TIME=$end
# Keep code that is compiled at run time on each node's own disk, where later starts find it.
cache=@cache_dir@
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
export CUDA_CACHE_PATH=$cache/cuda MPLCONFIGDIR=$cache/matplotlib

# Start one process per GPU (or CPU slot), with the copy of the code. If one process dies, srun ends the others.
launch() {
  exit_if_cancelled
  srun --export=ALL --nodes="$nodes" --ntasks=$((nodes * @tasks_per_node@)) --ntasks-per-node=@tasks_per_node@ \
    --kill-on-bad-exit=1@srun_options@ \
    @python@ "$run/slurm/code/run.py" "$@"
}

# Exclude the bad nodes from all later starts. Slurm can do this only for pending jobs. Therefore change the next jobs of the
# chain, or submit another job that replaces this one. $1: why the attempt ended.
exclude_bad_nodes_and_restart() {
  local nodes_to_exclude next
  exit_without_progress "$1"
  cat "$bad_nodes" >> "$excluded"
  nodes_to_exclude=$(sort -u "$excluded" | paste -sd,)
  if ! is_last_of_chain; then
    for next in $(other_jobs PD); do scontrol update JobId="$next" ExcNodeList="$nodes_to_exclude"; done
  else
    next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" --exclude="$nodes_to_exclude" \
      "$script" "$chain" replacement) &&
      log_message "Attempt ended: $1. Job ${next%%;*} resumes the run and excludes $nodes_to_exclude." && exit 0
  fi
  restart_run "$1"
}

if $preflight; then
  rm -f "$bad_nodes"
  launch preflight --run-dir "$run"@preflight_options@
  code=$?
  if [ $code != 0 ]; then
    bad=$(paste -sd, "$bad_nodes" 2>/dev/null)
    reason="preflight ended with exit code $code${bad:+ and reported bad nodes: $bad} (see $output)"
    if [ -n "$bad" ] && $exclude_bad_nodes; then exclude_bad_nodes_and_restart "$reason"; fi
    sleep "$pause"
    restart_run "$reason"
  fi
fi

log_message "Starting on $SLURM_JOB_NODELIST. Newest checkpoint: $(newest_checkpoint). Restart: ${SLURM_RESTART_COUNT:-0}."
rm -f "$exit_status"
launch @subcommand@ "$run/slurm/config.yaml"
code=$?

result=$(cat "$exit_status" 2>/dev/null)
case $result in
  finished*) log_message "Run $result."; exit 0 ;;
  failed*) log_message "Run $result"; exit 1 ;;   # a restart would fail in the same way
  *) restart_run "${result:-training ended with exit code $code and wrote no exit status (see $output)}" ;;
esac
