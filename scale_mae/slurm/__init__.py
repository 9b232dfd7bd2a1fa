"""Jobs on a Slurm cluster. Nothing here needs torch, so that it works on a login node beside a container."""
