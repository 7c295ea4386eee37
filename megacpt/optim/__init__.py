"""Learning-rate schedules, optimizers and parameter groups."""
