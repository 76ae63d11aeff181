"""From a manifest of clips and questions to packed batches."""
