"""The search for settings with Optuna: space, study, trials, winner."""
