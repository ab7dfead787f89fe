"""What a run will need before anyone rents it: memory, communication and time of a step, from configurations alone."""
