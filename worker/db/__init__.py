"""PostgreSQL, the only truth: models, the verbs that change a state, the reads, the migrations."""
