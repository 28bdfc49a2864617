"""Records trajectories, trains predictors on them, and finds schedules and noise stages for them."""
