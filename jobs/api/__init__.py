"""What ``import nestquant`` offers: quantize a network in memory, save, publish, load and pull it.

``quantization`` needs the extra ``service``; the rest needs ``run`` alone, as a device has it.
"""
