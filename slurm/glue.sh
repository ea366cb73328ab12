#!/usr/bin/env bash
# A whole run on a GLUE task: teacher and pruning on GPUs, consolidation on CPUs, recovery and report on GPUs.
#
#   sbatch slurm/glue.sh sst2 cofi 0.95                                   one node with four GPUs
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 slurm/glue.sh mnli grain 0.9 deepspeed.student=zero3
#
# Arguments: task, method, sparsity (or a speedup, 10x: over the dense model as measured in the job), then any key=value
# of the recipe METHOD_TASK (dsprune/recipes). As many tasks a node as it has GPUs. Every #SBATCH line can be overridden
# on the command line. What a site has to say (modules, virtual environment, container) stands in DSPRUNE_ACTIVATE: see
# lib.sh.
#
# Five minutes before its time is up the job saves, stops and requeues itself. The three phases are jobs of their own,
# each submitted by the one before when that has succeeded.

#SBATCH --job-name=dsprune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${DSPRUNE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || exit 64
need_checkout
if [ $# -lt 3 ]; then
    echo "usage: sbatch slurm/glue.sh TASK METHOD SPARSITY [key=value ...]" >&2
    exit 64
fi
three_phases "$DSPRUNE_HOME/slurm/glue.sh" "$@"
