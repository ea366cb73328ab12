# Shared by the job scripts beside it; to be sourced.
#
# What a site has to say stands in one variable, DSPRUNE_ACTIVATE: shell code that is run before anything else, on
# every node. It makes `python` the one that has dsprune's requirements, and may set the array WRAP, which then
# stands before every command:
#
#   DSPRUNE_ACTIVATE='source /path/.venv/bin/activate'
#   DSPRUNE_ACTIVATE='module load cuda && source /path/.venv/bin/activate'
#   DSPRUNE_ACTIVATE='WRAP=(apptainer exec --nv /path/dsprune.sif)'
#
# Others, all optional:
#
#   DSPRUNE_HOME           the checkout (where sbatch was called)
#   DSPRUNE_RUNS           parent of all run folders (DSPRUNE_HOME/runs), on storage that all nodes share
#   DSPRUNE_LAUNCHER       what starts ranks on a node: srun, or deepspeed (srun)
#   DSPRUNE_MAX_RESTARTS   how often a job requeues itself (50)
#   MASTER_PORT            where ranks meet (drawn from the job's number)

set -uo pipefail

DSPRUNE_HOME=${DSPRUNE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
DSPRUNE_RUNS=${DSPRUNE_RUNS:-$DSPRUNE_HOME/runs}
DSPRUNE_LAUNCHER=${DSPRUNE_LAUNCHER:-srun}
DSPRUNE_MAX_RESTARTS=${DSPRUNE_MAX_RESTARTS:-50}
export DSPRUNE_ACTIVATE=${DSPRUNE_ACTIVATE:-} DSPRUNE_HOME DSPRUNE_RUNS DSPRUNE_LAUNCHER DSPRUNE_MAX_RESTARTS

# Exit codes of dsprune (dsprune/errors.py) that starting again can mend.
LOST=69
PREEMPTED=75

say() {
    echo "[$(date '+%F %T')] $*"
}

# A command in the site's environment, from the checkout.
run() {
    local WRAP=()
    cd "$DSPRUNE_HOME" || return
    eval "$DSPRUNE_ACTIVATE"
    "${WRAP[@]}" "$@"
}

dsprune() {
    run env PYTHONPATH="$DSPRUNE_HOME${PYTHONPATH:+:$PYTHONPATH}" python -m dsprune "$@"
}

# One rank, started by srun as one of its tasks.
be_rank() {
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    run python "$DSPRUNE_HOME/dsprune/train.py" "$@"
}

# DeepSpeed's launcher on one node, started by srun once a node; it starts that node's ranks.
be_launcher() {
    local hosts ranks world
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    ranks=$(seq -s, 0 $((DSPRUNE_RANKS_PER_NODE - 1)))
    world=$(for host in $hosts; do printf '"%s": [%s], ' "$host" "$ranks"; done)
    world=$(printf '{%s}' "${world%, }" | base64 -w0)
    run python -m deepspeed.launcher.launch --world_info="$world" --node_rank="$SLURM_NODEID" \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "$DSPRUNE_HOME/dsprune/train.py" "$@"
}

# All ranks of the job, in the background: `train` waits for them. Ranks that are left when another has ended get two
# minutes to say why.
start_ranks() {
    # The batch script runs on the first node, where rank 0 will be; srun tells the others its address.
    local meet='export MASTER_ADDR=${MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}'
    local body=be_rank per_node=()
    if [ "$DSPRUNE_LAUNCHER" = deepspeed ]; then
        export DSPRUNE_RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
        body=be_launcher
        per_node=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none)
    fi
    # Ranks hear of a signal by the STOP file; srun itself would die of it.
    (
        trap '' USR1 USR2
        export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))}
        exec srun --kill-on-bad-exit=0 --wait=120 "${per_node[@]}" \
            bash -c "$meet; source '$DSPRUNE_HOME/slurm/lib.sh'; $body \"\$@\"" "$body" "$@"
    ) &
    RANKS=$!
}

# Train until done, or until it is time to go.
#
#   train RUN RECIPE key=value...
#
# RUN is the run folder. Returns 0 if and only if the run's status says that it is done; requeues the job where going
# on later makes sense: the job's time was up, or a rank was lost.
train() {
    local folder=$1 began code asked=
    shift
    began=$(date +%s)
    mkdir -p "$folder" && rm -f "$folder/STOP"
    trap 'asked=time; touch "$folder/STOP"' USR1 USR2
    trap 'asked=cancelled; touch "$folder/STOP"' TERM INT
    say "run folder $folder, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
    start_ranks "$@" output="$folder"
    while kill -0 "$RANKS" 2> /dev/null; do
        wait "$RANKS"
    done
    trap '' USR1 USR2 TERM INT
    dsprune status "$folder" --since "$began"
    code=$?
    case $code in
        0) ;;
        "$PREEMPTED" | "$LOST") requeue "$asked" ;;
    esac
    return "$code"
}

# Who was cancelled stays away, or is put back by SLURM itself if it was preempted.
requeue() {
    if [ "$1" = cancelled ]; then
        say "asked to leave: not requeued"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$DSPRUNE_MAX_RESTARTS" ]; then
        say "restarted ${SLURM_RESTART_COUNT:-0} times already (DSPRUNE_MAX_RESTARTS): not requeued"
    else
        say "requeueing"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # SLURM ends this script
    fi
}

# The key that a target on a script's command line sets: 0.95 is a sparsity, 10x a speedup, whose table of milliseconds
# the run itself measures, on a device of this job.
aim() {
    case $1 in
        *x) echo "prune.speedup=${1%x}" ;;
        *) echo "prune.target=$1" ;;
    esac
}

# Options of sbatch that give another job what this one has.
like_this_job() {
    local -A given=(
        [--account]=${SLURM_JOB_ACCOUNT:-}
        [--partition]=${SLURM_JOB_PARTITION:-}
        [--qos]=${SLURM_JOB_QOS:-}
        [--nodes]=${SLURM_JOB_NUM_NODES:-}
        [--ntasks-per-node]=${SLURM_NTASKS_PER_NODE:-}
        [--cpus-per-task]=${SLURM_CPUS_PER_TASK:-}
        [--gpus-per-node]=${SLURM_GPUS_PER_NODE:-}
    )
    local option
    for option in "${!given[@]}"; do
        [ -n "${given[$option]}" ] && [ "${given[$option]}" != "(null)" ] && echo "$option=${given[$option]}"
    done
}

# What a script says before it does anything, where it was not submitted from the checkout.
need_checkout() {
    [ -f "$DSPRUNE_HOME/dsprune/train.py" ] && return
    echo "error: $DSPRUNE_HOME is no checkout of dsprune: call sbatch there, or set DSPRUNE_HOME" >&2
    exit 64
}

# The phase of a run that this job is, and then the job of the next one.
#
#   three_phases SCRIPT TASK METHOD TARGET key=value...
#
# RECIPE=path stands in for the shipped recipe METHOD_TASK.
three_phases() {
    local script=$1 task=$2 method=$3 target=$4
    shift 4
    local folder=${RUN:-$DSPRUNE_RUNS/$method-$task-$target}
    local recipe=${RECIPE:-${method}_$task} settings=("$(aim "$target")" "$@")
    export RUN=$folder RECIPE=$recipe
    case ${DSPRUNE_PHASE:-train} in
        train)
            train "$folder" "$recipe" "${settings[@]}" 'stages=["teacher", "prune"]' || exit
            next_phase consolidate --nodes=1 --ntasks=1 --ntasks-per-node=1 --gpus-per-node=0 \
                --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$script" "$task" "$method" "$target" "$@"
            ;;
        consolidate)
            # One process without GPUs: what the engines would run on does not matter, half precision would be refused.
            train "$folder" "$recipe" "${settings[@]}" deepspeed.student=zero0 deepspeed.teacher=teacher batch.micro=1 \
                'stages=["consolidate"]' || exit
            # shellcheck disable=SC2086
            next_phase recover $LIKE_FIRST "$script" "$task" "$method" "$target" "$@"
            ;;
        recover)
            train "$folder" "$recipe" "${settings[@]}" 'stages=["recover", "evaluate"]' || exit
            say "finished: $folder"
            ;;
    esac
}

# Submit the next phase, to begin when this job has ended well.
#
#   next_phase PHASE sbatch-options... SCRIPT arguments...
next_phase() {
    local phase=$1
    shift
    export DSPRUNE_PHASE=$phase LIKE_FIRST=${LIKE_FIRST:-$(like_this_job | tr '\n' ' ')}
    local after=$SLURM_JOB_ID clean=() name
    # What SLURM told this job must not be taken for the next one's own.
    for name in $(compgen -e SLURM_ | grep -v '^SLURM_CONF$'); do clean+=(-u "$name"); done
    say "next: $phase, job $(cd "$SLURM_SUBMIT_DIR" && env "${clean[@]}" sbatch --parsable --dependency="afterok:$after" "$@")"
}
