#!/usr/bin/env bash
# A whole run on SQuAD: teacher and pruning on GPUs, consolidation on CPUs, recovery and report on GPUs.
#
#   sbatch slurm/squad.sh squad cofi 0.8
#   sbatch slurm/squad.sh squad_v2 grain 0.9 deepspeed.student=zero3
#
# Arguments, phases and variables as for glue.sh; SQuAD takes longer and its sequences are longer.

#SBATCH --job-name=dsprune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source "${DSPRUNE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/lib.sh" || exit 64
need_checkout
case ${1:-} in
    squad | squad_v2) ;;
    *) echo "usage: sbatch slurm/squad.sh squad|squad_v2 METHOD SPARSITY [key=value ...]" >&2 && exit 64 ;;
esac
if [ $# -lt 3 ]; then
    echo "usage: sbatch slurm/squad.sh squad|squad_v2 METHOD SPARSITY [key=value ...]" >&2
    exit 64
fi
three_phases "$DSPRUNE_HOME/slurm/squad.sh" "$@"
