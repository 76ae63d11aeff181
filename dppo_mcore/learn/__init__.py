"""Learning steps: RL and SFT as siblings over one exact, resumable step."""
