"""A model of how long a kernel takes on a GPU, from its compiled code and its launch. It measures nothing.

`devices` holds the constants and where they come from, `machine_code` reads what was compiled, `multiprocessor` runs
it, instruction by instruction, on one of the four schedulers of a multiprocessor, and `arrivals` runs all programs of a
launch whose programs meet. `prediction` puts these together for one launch.
"""
