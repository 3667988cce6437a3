"""Claims that anyone can rerun: conditions x seeds under one budget, statistics and a report."""
