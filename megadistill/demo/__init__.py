"""The demo: built-in corpus and models, and the verbs that run the whole job on them. Nothing below knows it."""
