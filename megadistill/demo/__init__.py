"""The demo: built-in corpus and models, and the verbs that run the whole job on them. No lower floor imports it."""
