"""DeepSpeed: partitioned models, the trained one and the frozen one, and what each rank holds of them."""
