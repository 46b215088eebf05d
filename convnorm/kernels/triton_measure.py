def measure_triton(weights, plan, shape):
    raise NotImplementedError
