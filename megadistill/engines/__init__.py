"""DeepSpeed: partitioned models, the trained one and the frozen one, and what their parts hold."""
