"""The pure core: `step(state, event, now_s) -> list[Effect]`. No I/O, clock, randomness or logging in here."""
