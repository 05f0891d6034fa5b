"""Where processes run: device inventory and the backends that start workers. Knows nothing of models."""
