"""The processes of a job: their ranks, their process group, signals to stop, and the vote to stop together."""
