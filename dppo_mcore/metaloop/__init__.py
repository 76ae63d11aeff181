"""The parts of the metaloop that touch several ranks: the run, rolling out, RL and SFT phases, evaluation."""
