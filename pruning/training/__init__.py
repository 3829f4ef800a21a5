"""Fine-tuning: settings, trainer, schedule, retries, resuming, several GPUs, distillation."""
