"""Side commands: estimate, pilot, batch, rerank."""
