"""What moves the weights and what is kept of them: optimizers, schedules, averages, the most robust epoch."""
