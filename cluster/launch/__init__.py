"""Starting a command on machines elsewhere: Ray Jobs, Slurm, Kubernetes, machines that Ray's autoscaler rents."""
