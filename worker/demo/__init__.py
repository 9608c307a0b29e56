"""`exarq demo`: two workers, one killed, Redis wiped; the proof that nothing is lost and nothing happened twice."""
