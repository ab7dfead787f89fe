"""What happens around a step: record keeping, validation, non-finite steps, throughput, profiling."""
