"""Who turns raw examples into arrays before the echo? This process, others of this machine, or Ray actors."""
