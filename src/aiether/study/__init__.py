"""Studies: conditions x seeds under one budget, their statistics and their report."""
