"""Where runs are started: on this machine, on several by torchrun, by Slurm. A class each, named by configs/launcher."""
