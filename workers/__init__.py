"""What one worker does: read its tensors, quantize, encode, calibrate, evaluate.

Plain functions; Ray enters in ``workers.on_ray.executor`` alone.
"""
