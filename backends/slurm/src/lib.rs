//! Slurm through sbatch, squeue, sacct and scancel.
