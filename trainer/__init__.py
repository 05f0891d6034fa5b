"""What a worker does: model, data, loss, parallelism, checkpoint, consolidate, merge, chat, evaluate."""
