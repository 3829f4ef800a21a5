"""Starting a command on machines elsewhere: Ray Jobs, Slurm, Kubernetes."""
