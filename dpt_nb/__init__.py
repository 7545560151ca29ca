"dpt_nb: dense prediction with vision transformers, from notebooks."
__version__ = "0.1.0"
