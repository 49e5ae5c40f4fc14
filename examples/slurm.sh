#!/bin/bash
# Pretraining on a SLURM cluster, a process for each GPU, in as many jobs as it takes:
#
#   sbatch examples/slurm.sh runs/pile-1.4b --config configs/pretrain/pile-1.4b.yaml --fsdp
#
# The first argument is the run folder, which all nodes must see; the rest are options of
# `stablemask pretrain`. Five minutes before its time is up the job saves a checkpoint, stops, and is put
# back into the queue, where it goes on; a process that dies ends the job with its error.

#SBATCH --job-name=stablemask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append

set -euo pipefail

out=$1
shift
if [[ -e $out/pretrain.yaml ]]; then
  set -- "$@" --resume
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec python -m stablemask pretrain "$@"' pretrain --out "$out" "$@"

if [[ ! -e $out/model.safetensors ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
