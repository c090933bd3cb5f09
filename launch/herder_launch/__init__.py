"""Bring a cluster up over SSH, repair it, and take it down. Runs where the user's SSH keys are."""
