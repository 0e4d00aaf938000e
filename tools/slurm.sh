#!/bin/bash
# A study on the nodes of a Slurm job, from the project's folder on a disk that all nodes share:
#   sbatch --nodes=4 --gpus-per-node=8 tools/slurm.sh --profile paper --outputs /shared/outputs
# Submit it again after the time limit, a lost node or scancel: what is finished is skipped.
#SBATCH --job-name=telco-nb
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:INT@120
# (--signal: Ctrl-C two minutes before the time limit, so that steps stop where they can go on.)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/  # Ray reports even that reports are off
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')  # srun hands it to the nodes
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address)
address="${ip%% *}:${RAY_PORT:-6379}"
processor='{"processor": 1}'  # jobs without a GPU run on nodes that offer this, one at a time
on_gpu_nodes=$([ -n "${SLURM_GPUS_ON_NODE:-}" ] && echo '{}' || echo "$processor")

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --block --node-ip-address="${ip%% *}" --port="${address##*:}" \
  --node-name="$head" --resources="$processor" --include-dashboard=false --disable-usage-stats &
started=($!)
until ray health-check --address "$address"; do kill -0 "${started[0]}"; sleep 2; done  # ends if the head has ended
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 -w "$node" ray start --block --address="$address" --node-name="$node" \
    --resources="$on_gpu_nodes" --disable-usage-stats &
  started+=($!)
done
until python -c 'import ray, sys
ray.init(sys.argv[1], logging_level="ERROR")
sys.exit(len(ray.nodes()) < int(sys.argv[2]))' "$address" "${#nodes[@]}"; do
  for pid in "${started[@]}"; do kill -0 "$pid"; done  # ends if a node has ended
  sleep 1
done

exec python run_all.py --engine ray --address "$address" "$@"  # Slurm ends the nodes when this ends
