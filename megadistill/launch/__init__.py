"""This process's place in a job: launchers, rendezvous, signals, lost ranks."""
