#!/usr/bin/env bash
# Many runs as job arrays: every task with every sparsity, ending in one table and a Pareto plot.
#
#   slurm/sweep.sh "sst2 mrpc" cofi "0.6 0.8 0.95"                        submits, on a login node
#   slurm/sweep.sh sst2 "cofi grain" "0.9" --partition=gpu --time=12:00:00 -- prune.lr=3e-5
#
# Arguments: tasks, methods, sparsities (or speedups: 10x); options of sbatch; after `--`, any key=value of the recipes.
# One array job fine-tunes a teacher for each task, a second prunes, consolidates and recovers, and when all have ended,
# well or not, a third collects: DSPRUNE_RUNS/sweep-NAME/table.txt and pareto.png (NAME: SWEEP, by default the date).
# Variables as for glue.sh.

#SBATCH --job-name=dsprune-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

source "${DSPRUNE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || exit 64
need_checkout

submit() {
    if [ $# -lt 3 ]; then
        echo 'usage: slurm/sweep.sh "TASKS" "METHODS" "SPARSITIES" [sbatch options] [-- key=value ...]' >&2
        exit 64
    fi
    read -ra tasks <<< "$1"
    read -ra methods <<< "$2"
    read -ra targets <<< "$3"
    shift 3
    local options=() teachers pruning collect folder runs=$((${#tasks[@]} * ${#methods[@]} * ${#targets[@]}))
    while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1") && shift; done
    [ "${1:-}" = -- ] && shift
    folder=$DSPRUNE_RUNS/sweep-${SWEEP:-$(date +%Y%m%d-%H%M%S)}
    mkdir -p "$folder"
    export SWEEP_FOLDER=$folder TASKS="${tasks[*]}" METHODS="${methods[*]}" TARGETS="${targets[*]}"
    teachers=$(SWEEP_PHASE=teacher sbatch --parsable --array=0-$((${#tasks[@]} - 1)) "${options[@]}" "$SELF" "$@")
    pruning=$(SWEEP_PHASE=prune sbatch --parsable --array=0-$((runs - 1)) --dependency="afterok:$teachers" \
        --kill-on-invalid-dep=yes "${options[@]}" "$SELF" "$@")
    collect=$(SWEEP_PHASE=collect sbatch --parsable --dependency="afterany:$pruning" "${options[@]}" \
        --nodes=1 --ntasks=1 --ntasks-per-node=1 --gpus-per-node=0 "$SELF")
    echo "$runs runs in $folder: teachers $teachers, runs $pruning, table $collect"
}

fine_tune() {
    read -ra tasks <<< "$TASKS"
    read -ra methods <<< "$METHODS"
    local task=${tasks[$SLURM_ARRAY_TASK_ID]}
    train "$SWEEP_FOLDER/teacher-$task" "${RECIPE:-${methods[0]}_$task}" "$@" 'stages=["teacher"]'
}

prune() {
    read -ra tasks <<< "$TASKS"
    read -ra methods <<< "$METHODS"
    read -ra targets <<< "$TARGETS"
    local index=$SLURM_ARRAY_TASK_ID task method target
    target=${targets[$((index % ${#targets[@]}))]}
    index=$((index / ${#targets[@]}))
    method=${methods[$((index % ${#methods[@]}))]}
    task=${tasks[$((index / ${#methods[@]}))]}
    train "$SWEEP_FOLDER/$method-$task-$target" "${RECIPE:-${method}_$task}" "$(aim "$target")" \
        teacher.path="$SWEEP_FOLDER/teacher-$task/teacher/model" "$@"
}

collect() {
    local runs=()
    for run in "$SWEEP_FOLDER"/*/; do
        [[ $(basename "$run") == teacher-* ]] || runs+=("$run")
    done
    dsprune compare "${runs[@]}" --plot "$SWEEP_FOLDER/pareto.png" | tee "$SWEEP_FOLDER/table.txt"
}

SELF=$DSPRUNE_HOME/slurm/sweep.sh
case ${SWEEP_PHASE:-submit} in
    submit) submit "$@" ;;
    teacher) fine_tune "$@" ;;
    prune) prune "$@" ;;
    collect) collect ;;
esac
